//! Dumps without their memory, and restores that get it from elsewhere: to the end, undone at every stage, and
//! with the death of whoever held them.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::Duration;

use libtest_mimic::Failed;
use pageferry_criu_glue::image::{pagemap::Pagemap, tree};
use pageferry_criu_glue::{
    CallError, Criu, DumpError, HideError, ImageDir, Owned, PAGE_SIZE, Restore, RestoreOptions, Stage, Wait,
};

use crate::memory::{Member, Tree, is_gone};
use crate::server::Server;
use crate::{PATIENCE, begin, explain};

/// The argument by which this program holds a restore until it is killed.
pub const HOLDER: &str = "__hold-restore";
/// The argument by which this program is one that changes the flags of its memory.
pub const CHANGER: &str = "__changer";
const PAGES: u64 = 2048;

/// Makes what is restored our child once criu ends, so that it can be reaped.
pub fn adopt() {
    let own = rustix::process::getpid();
    rustix::process::set_child_subreaper(Some(own)).expect("a process may always be a subreaper");
}

/// Dumps a tree without its memory and ends it; gives back what a restore needs.
fn moved_out(tree: &mut Tree) -> Result<(ImageDir, Server, [u64; 2]), Failed> {
    let images = ImageDir::new()?;
    let mut dump = begin(&images, tree.root())?;
    dump.freeze(PATIENCE)?;
    let mut server = Server::default();
    let mut owned = Vec::new();
    for member in &tree.members {
        let mine = member.owned()?;
        server.memory.insert(member.pid, member.read(&mine.runs)?.into_iter().collect());
        owned.push(mine);
    }
    let counts = [tree.members[0].count()?, tree.members[1].count()?];
    dump.dump(&owned, PATIENCE).map_err(explain)?;
    server.add_images(&images)?;
    dump.commit(PATIENCE).map_err(explain)?;
    tree.gone()?;
    Ok((images, server, counts))
}

/// Runs `restore` beside a server of its memory.
fn served<T: Send>(
    server: &Server,
    restore: Restore,
    complete: bool,
    run: impl FnOnce(Restore) -> Result<T, Failed>,
) -> Result<T, Failed> {
    let listener = restore.lazy()?;
    std::thread::scope(|scope| {
        let tasks = scope.spawn(|| server.accept(listener));
        let faults = scope.spawn(|| server.serve());
        let outcome = run(restore);
        server.stop();
        faults.join().map_err(|_| "the server panicked")??;
        let (tasks, restored) = tasks.join().map_err(|_| "the listener panicked")?;
        let outcome = outcome?;
        // That all are restored is said on the way from post-restore to pre-resume.
        if (tasks, restored) != (2, complete) {
            return Err(format!("{tasks} tasks came, all restored: {restored}").into());
        }
        Ok(outcome)
    })
}

fn kill(pid: i32) -> Result<(), Failed> {
    let pid = rustix::process::Pid::from_raw(pid).ok_or("no pid")?;
    Ok(rustix::process::kill_process(pid, rustix::process::Signal::KILL)?)
}

pub fn moves() -> Result<(), Failed> {
    let mut tree = Tree::start(PAGES)?;
    let (images, server, counts) = moved_out(&mut tree)?;
    if tree::root_vpid(&images)? != tree.root() || tree::tasks(&images)?.len() != 2 {
        return Err("the images name another tree".into());
    }
    let size: u64 = images.list()?.iter().map(|(_, bytes)| bytes).sum();
    if size > PAGES * PAGE_SIZE / 2 {
        return Err(format!("{size} bytes of images: the memory is in them").into());
    }
    let restore = Restore::prepare(&Criu::find(None)?, &images, RestoreOptions::default())?;
    served(&server, restore, true, |mut restore| {
        restore.start()?;
        for stage in [Stage::PostRestore, Stage::PreResume, Stage::PostResume] {
            if restore.wait(stage, PATIENCE).map_err(explain)? != Some(tree.root()) {
                return Err("it has another root".into());
            }
            if stage == Stage::PostRestore {
                server.fill()?;
            }
        }
        let pid = restore.finish().map_err(explain)?;
        let check = || -> Result<(), Failed> {
            for (member, count) in tree.members.iter().zip(counts) {
                member.counts_on_from(count)?;
                member.verify()?;
            }
            tree.lives()
        };
        let outcome = check();
        tree.members.iter().rev().try_for_each(|m| kill(m.pid))?;
        outcome?;
        if pid != tree.root() { Err("finish names another root".into()) } else { Ok(()) }
    })?;
    tree.gone()
}

pub fn undone() -> Result<(), Failed> {
    let mut tree = Tree::start(PAGES)?;
    let (images, server, _) = moved_out(&mut tree)?;
    // The same images again and again: what was undone leaves neither tasks nor pids in use.
    for stage in [Stage::PostRestore, Stage::PreResume, Stage::PostResume] {
        let server = server.again();
        let restore = Restore::prepare(&Criu::find(None)?, &images, RestoreOptions::default())?;
        served(&server, restore, stage != Stage::PostRestore, |mut restore| {
            restore.start()?;
            restore.wait(stage, PATIENCE).map_err(explain)?;
            if tree.members.iter().any(Member::is_dead) {
                return Err(format!("{stage:?}: it was not restored").into());
            }
            restore.abort().map_err(explain)
        })?;
        if !tree.members.iter().all(Member::is_dead) {
            return Err(format!("{stage:?}: it lives on").into());
        }
        tree.gone()?;
    }
    // Nothing is started yet; criu is at work: neither leaves anything.
    Restore::prepare(&Criu::find(None)?, &images, RestoreOptions::default())?.abort()?;
    for pause in [0, 5, 10, 20, 40] {
        let mut restore = Restore::prepare(&Criu::find(None)?, &images, RestoreOptions::default())?;
        let listener = restore.lazy()?;
        let server = Server::default();
        std::thread::scope(|scope| -> Result<(), Failed> {
            let tasks = scope.spawn(|| server.accept(listener));
            restore.start()?;
            std::thread::sleep(Duration::from_millis(pause));
            restore.abort().map_err(explain)?;
            tasks.join().map_err(|_| "the listener panicked")?;
            Ok(())
        })?;
        if !tree.members.iter().all(Member::is_dead) {
            return Err(format!("undone after {pause} ms, it lives on").into());
        }
        tree.gone()?;
    }
    Ok(())
}

/// Moves a tree out and restores it up to post-restore, says which it is, and waits for its end.
pub fn hold() -> ! {
    adopt();
    let run = || -> Result<(), Failed> {
        let mut tree = Tree::start(PAGES)?;
        let (images, server, _) = moved_out(&mut tree)?;
        let restore = Restore::prepare(&Criu::find(None)?, &images, RestoreOptions::default())?;
        served(&server, restore, false, |mut restore| {
            restore.start()?;
            restore.wait(Stage::PostRestore, PATIENCE).map_err(explain)?;
            println!("{} {}", tree.members[0].pid, tree.members[1].pid);
            std::thread::sleep(Duration::from_secs(3600));
            Ok(())
        })
    };
    panic!("{:?}", run().err());
}

pub fn holder_dies() -> Result<(), Failed> {
    let mut holder = Command::new("/proc/self/exe").arg(HOLDER).stdout(Stdio::piped()).spawn()?;
    let mut line = String::new();
    BufReader::new(holder.stdout.take().ok_or("no output")?).read_line(&mut line)?;
    holder.kill()?;
    holder.wait()?;
    let pids: Vec<i32> = line.split_ascii_whitespace().map(str::parse).collect::<Result<_, _>>()?;
    let until = std::time::Instant::now() + PATIENCE;
    while pids.len() != 2 || !pids.iter().all(|&pid| is_gone(pid)) {
        if std::time::Instant::now() > until {
            return Err(format!("the restored tree outlived its holder: {line:?}").into());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Hides every second page of a buffer: criu's images must have the others, and only them.
pub fn exact() -> Result<(), Failed> {
    let tree = Tree::start(PAGES)?;
    let member = tree.members[0];
    let images = ImageDir::new()?;
    let mut dump = begin(&images, tree.root())?;
    dump.freeze(PATIENCE)?;
    let first = member.address / PAGE_SIZE;
    let runs: Vec<(u64, u64)> = (first..first + PAGES).step_by(2).map(|page| (page, 1)).collect();
    let populated = member.populated()?;
    dump.dump(&[Owned { pid: member.pid, vpid: member.pid, runs, populated }], PATIENCE)?;
    let dumped: Vec<u64> = Pagemap::read(&images, member.pid)?
        .entries
        .iter()
        .flat_map(|e| e.address / PAGE_SIZE..e.end() / PAGE_SIZE)
        .filter(|page| (first..first + PAGES).contains(page))
        .collect();
    let expected: Vec<u64> = (first..first + PAGES).skip(1).step_by(2).collect();
    dump.abort()?;
    if dumped != expected {
        return Err(format!("{} pages in the images instead of {}", dumped.len(), expected.len()).into());
    }
    tree.lives()
}

/// What may not be hidden, or is claimed to exist and does not, is refused, and the tree lives on.
pub fn lies() -> Result<(), Failed> {
    let tree = Tree::start(16)?;
    let member = tree.members[0];
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", member.pid))?;
    let text = maps.lines().find(|line| line.contains("r-xp")).ok_or("no program text")?;
    let text = u64::from_str_radix(text.split('-').next().ok_or("no address")?, 16)? / PAGE_SIZE;
    let unmapped = 16;
    let data = member.address / PAGE_SIZE;
    let lie = |runs: Vec<(u64, u64)>, populated: Vec<(u64, u64)>| Owned {
        pid: member.pid,
        vpid: member.pid,
        runs,
        populated,
    };
    let lies = [
        ("file-backed", lie(vec![(text, 1)], vec![])),
        ("unmapped", lie(vec![(unmapped, 1)], vec![])),
        ("nobody's", lie(vec![(data, 1)], vec![(unmapped, 1)])),
        ("unsorted", lie(vec![(data, 1), (data, 1)], vec![])),
        ("empty", lie(vec![(data, 0)], vec![])),
        ("another vpid", Owned { vpid: 1, ..lie(vec![(data, 1)], vec![]) }),
    ];
    for (name, owned) in lies {
        let images = ImageDir::new()?;
        let mut dump = begin(&images, tree.root())?;
        dump.freeze(PATIENCE)?;
        let error = dump.dump(&[owned], PATIENCE).err().ok_or_else(|| format!("{name} was accepted"))?;
        let known = matches!(
            &error,
            DumpError::Check { .. } | DumpError::Hide { source: HideError::Runs { .. }, .. }
        );
        if !known || !matches!(dump.commit(PATIENCE), Err(DumpError::Order { .. })) {
            return Err(format!("{name}: {error:?}, or it could be committed").into());
        }
        tree.lives()?;
    }
    Ok(())
}

/// What smaps says is read before the freeze: criu's images are the same as if it had read it itself, and a flag that
/// changed in between is found before anybody relies on them.
pub fn looks_ahead() -> Result<(), Failed> {
    let tree = Tree::start(PAGES)?;
    let pids: Vec<i32> = tree.members.iter().map(|m| m.pid).collect();
    let owned = || tree.members.iter().map(Member::owned).collect::<Result<Vec<_>, _>>();
    let mut seen = Vec::new();
    for ahead in [false, true] {
        let images = ImageDir::new()?;
        let mut dump = begin(&images, tree.root())?;
        if ahead {
            dump.look_ahead(&pids);
        }
        dump.freeze(PATIENCE)?;
        dump.dump(&owned()?, PATIENCE).map_err(explain)?;
        dump.confirm().map_err(explain)?;
        let mut areas = Vec::new();
        for pid in &pids {
            let mut bytes = Vec::new();
            images.open(&format!("mm-{pid}.img"))?.read_to_end(&mut bytes)?;
            areas.push(bytes);
        }
        seen.push(areas);
        dump.abort().map_err(explain)?;
    }
    if seen[0] != seen[1] {
        return Err("criu wrote down other areas from what was read before".into());
    }
    tree.lives()
}

/// A program that changes a flag of its memory between the look ahead and the freeze.
pub fn areas_changed() -> Result<(), Failed> {
    let mut child = Command::new("/proc/self/exe")
        .arg(CHANGER)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let result = (|| -> Result<(), Failed> {
        let mut told = BufReader::new(child.stdout.take().ok_or("no output")?).lines();
        let mut orders = child.stdin.take().ok_or("no input")?;
        told.next().ok_or("it did not start")??;
        let pid = child.id() as i32;
        let images = ImageDir::new()?;
        let mut dump = begin(&images, pid)?;
        dump.look_ahead(&[pid]);
        writeln!(orders, "change")?;
        told.next().ok_or("it did not change")??;
        dump.freeze(PATIENCE).map_err(explain)?;
        // Only what is owned is told of before.
        let owned = Owned { pid, vpid: pid, ..Owned::default() };
        dump.dump(&[owned], PATIENCE).map_err(explain)?;
        match dump.confirm() {
            Err(DumpError::AreasChanged { pid: of, detail }) if of == pid && detail.contains("dc") => {}
            other => return Err(format!("{other:?} instead of changed areas").into()),
        }
        if !matches!(dump.commit(PATIENCE), Err(DumpError::Order { .. })) {
            return Err("it could be committed".into());
        }
        writeln!(orders, "again")?;
        told.next().ok_or("it does not run on")??;
        Ok(())
    })();
    // It may have ended with the pipe already.
    let _ = child.kill();
    child.wait()?;
    result
}

/// The `main` of the program that changes its flags at every line that it reads.
pub fn change() -> std::io::Result<()> {
    let region = memmap2::MmapMut::map_anon(64 * PAGE_SIZE as usize)?;
    println!("ready");
    let mut line = String::new();
    while std::io::stdin().read_line(&mut line)? > 0 {
        region.advise(memmap2::Advice::DontFork)?;
        println!("changed");
        line.clear();
    }
    Ok(())
}

/// A wait ends when its descriptor becomes readable, its connection is closed at the other side, or its time is up; what it waited for is
/// undone.
pub fn cancelled() -> Result<(), Failed> {
    let tree = Tree::start(PAGES)?;
    let (cancel, canceller) = rustix::pipe::pipe()?;
    rustix::io::write(&canceller, &[1])?;
    let (closed, mut other) = UnixStream::pair()?;
    other.write_all(b"unread")?;
    drop(other);
    let wait = |timeout| Wait::from(timeout);
    for (wait, wanted) in [
        (Wait { cancel: Some(cancel.as_fd()), ..wait(PATIENCE) }, "cancelled"),
        (Wait { peer: Some(closed.as_fd()), ..wait(PATIENCE) }, "closed"),
        (wait(Duration::ZERO), "timeout"),
    ] {
        let images = ImageDir::new()?;
        let mut dump = begin(&images, tree.root())?;
        // An answer that is there at once may win; then the next step is interrupted.
        let error =
            dump.freeze(wait).and_then(|()| dump.dump(&[], wait)).err().ok_or("it was not interrupted")?;
        let closed = matches!(&error, DumpError::Call { source: CallError::PeerClosed { .. }, .. });
        let got = [(error.is_cancelled(), "cancelled"), (closed, "closed"), (error.is_timeout(), "timeout")];
        if got.iter().any(|(is, what)| *is != (*what == wanted)) {
            return Err(format!("{wanted}: {error:?}").into());
        }
        dump.abort()?;
        tree.lives()?;
    }
    // Whatever a peer says that is there, the wait goes on.
    let (open, mut other) = UnixStream::pair()?;
    other.write_all(b"unread")?;
    let images = ImageDir::new()?;
    let mut dump = begin(&images, tree.root())?;
    dump.freeze(Wait { peer: Some(open.as_fd()), ..wait(PATIENCE) })?;
    dump.abort()?;
    tree.lives()?;
    Ok(())
}
