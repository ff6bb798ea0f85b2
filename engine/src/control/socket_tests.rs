use super::super::{AskError, Control, PROTOCOL, Request, Status, ask};
use super::*;
use std::io::{BufRead, BufReader};

/// Something that must not be waited for takes less.
const LIMIT: Duration = Duration::from_secs(60);

struct Served {
    dir: tempfile::TempDir,
    control: Control,
    socket: ControlSocket,
}

fn served() -> Served {
    let dir = tempfile::tempdir().unwrap();
    let control = Control::new(Cancel::new().unwrap());
    let socket = ControlSocket::open(&dir.path().join("s"), control.clone()).unwrap();
    Served { dir, control, socket }
}

fn connect(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.set_write_timeout(Some(LIMIT)).unwrap();
    stream
}

fn status(path: &Path) -> Status {
    ask(path, &Request::Status {}).unwrap().status.unwrap()
}

fn read_answer(stream: &UnixStream) -> Answer {
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    serde_json::from_str(&line).unwrap()
}

#[test]
fn a_client_asks_and_the_migration_obeys() {
    let Served { control, socket, dir: _dir } = served();
    let path = socket.path();
    assert!(ask(path, &Request::Pause {}).unwrap().ok && control.is_paused());
    let answer = ask(path, &Request::Bandwidth { bytes_per_second: Some(7) }).unwrap();
    assert_eq!((answer.protocol, answer.status.unwrap().bandwidth), (PROTOCOL, Some(7)));
    control.enter(super::super::Stage::Ended);
    let answer = ask(path, &Request::Resume {}).unwrap();
    assert_eq!((answer.ok, answer.error), (false, Some(ErrorKind::Refused)));
    assert!(answer.message.unwrap().contains("over"));
    let mode = fs::metadata(path).unwrap().mode();
    assert_eq!(mode & 0o777, 0o600, "nobody else may even try");
}

#[test]
fn the_file_is_there_as_long_as_somebody_answers() {
    let Served { dir, control, socket } = served();
    let path = socket.path().to_owned();
    let second = ControlSocket::open(&path, control.clone()).unwrap_err();
    assert!(matches!(second, SocketError::Live(_)), "{second}");
    assert!(!status(&path).paused, "the first answers as before");
    drop(socket);
    assert!(matches!(ask(&path, &Request::Status {}), Err(AskError::Nobody(_))));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left");
}

#[test]
fn what_dead_engines_left_in_the_directory_goes_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let socket = ControlSocket::open(&path("migrate-1.sock"), Control::new(Cancel::new().unwrap())).unwrap();
    for name in ["migrate-2.sock", "receive-2.sock", "migrate-3.sock.77", "other.sock"] {
        drop(UnixListener::bind(path(name)).unwrap());
    }
    fs::write(path("migrate-4.sock"), "mine").unwrap();
    sweep(dir.path());
    let left = |name: &str| path(name).exists();
    assert!(
        !left("migrate-2.sock") && !left("receive-2.sock") && left("migrate-3.sock.77") && left("other.sock")
    );
    assert!(left("migrate-4.sock") && !status(&path("migrate-1.sock")).paused);
    drop(socket);
}

#[test]
fn what_a_dead_engine_left_is_replaced_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let control = Control::new(Cancel::new().unwrap());
    let stale = dir.path().join("stale");
    drop(UnixListener::bind(&stale).unwrap());
    assert!(matches!(ask(&stale, &Request::Status {}), Err(AskError::Nobody(_))));
    let socket = ControlSocket::open(&stale, control.clone()).unwrap();
    assert!(!status(&stale).paused);
    // What took its name is not this one's to take away.
    fs::remove_file(&stale).unwrap();
    fs::write(&stale, "mine").unwrap();
    drop(socket);
    assert_eq!(fs::read_to_string(&stale).unwrap(), "mine");
    let refused = ControlSocket::open(&stale, control.clone()).unwrap_err();
    assert!(matches!(refused, SocketError::NotSocket(_)), "{refused}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);

    let long = dir.path().join("x".repeat(200));
    assert!(matches!(ControlSocket::open(&long, control.clone()), Err(SocketError::Io { .. })));
    let nowhere = dir.path().join("no/such/socket");
    assert!(matches!(ControlSocket::open(&nowhere, control), Err(SocketError::Io { .. })));
}

#[test]
fn the_directory_is_made_for_its_owner_only() {
    let dir = tempfile::tempdir().unwrap();
    let ours = dir.path().join("pageferry");
    make_directory(&ours).unwrap();
    fs::set_permissions(&ours, Permissions::from_mode(0o777)).unwrap();
    make_directory(&ours).unwrap();
    assert_eq!(fs::metadata(&ours).unwrap().mode() & 0o777, 0o700);
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(&ours, &link).unwrap();
    assert!(matches!(make_directory(&link), Err(SocketError::Foreign(_))));
    if nix::unistd::geteuid().is_root() {
        let theirs = dir.path().join("theirs");
        fs::create_dir(&theirs).unwrap();
        std::os::unix::fs::chown(&theirs, Some(65534), None).unwrap();
        assert!(matches!(make_directory(&theirs), Err(SocketError::Foreign(_))));
    }
}

#[test]
fn root_and_the_engines_own_user_are_allowed() {
    assert!(is_allowed(0, 0) && is_allowed(0, 1000) && is_allowed(1000, 1000));
    assert!(!is_allowed(1000, 0) && !is_allowed(65534, 0) && !is_allowed(1001, 1000));
}

#[test]
fn a_line_that_does_not_end_is_refused() {
    let Served { socket, dir: _dir, .. } = served();
    let mut stream = connect(socket.path());
    // The engine may close while this is under way.
    let _ = stream.write_all(&vec![b'x'; 100_000]);
    let mut line = String::new();
    match BufReader::new(&stream).read_line(&mut line) {
        Ok(_) => {
            let answer: Answer = serde_json::from_str(&line).unwrap();
            assert_eq!(answer.error, Some(ErrorKind::TooLong), "{line}");
        }
        Err(error) => assert_eq!(error.kind(), io::ErrorKind::ConnectionReset),
    }
    assert!(!status(socket.path()).paused, "others are answered");

    // The longest that is allowed.
    let mut stream = connect(socket.path());
    let request = r#"{"command":"pause"}"#;
    let line = format!("{request}{}\n", " ".repeat(MAX_LINE - request.len() - 1));
    stream.write_all(line.as_bytes()).unwrap();
    assert!(read_answer(&stream).ok);
}

#[test]
fn garbage_is_answered_and_the_next_line_is_read() {
    let Served { socket, control, dir: _dir } = served();
    let stream = connect(socket.path());
    let mut lines = BufReader::new(&stream);
    (&stream).write_all(b"\n\xff\xfe\x00garbage\n[[[[\n{\"command\":\"pause\"}\n").unwrap();
    for (n, error) in [Some(ErrorKind::BadRequest); 3].into_iter().chain([None]).enumerate() {
        let mut line = String::new();
        lines.read_line(&mut line).unwrap();
        assert_eq!(serde_json::from_str::<Answer>(&line).unwrap().error, error, "line {n}: {line}");
    }
    assert!(control.is_paused());
}

#[test]
fn a_line_may_come_byte_by_byte_while_others_are_answered() {
    let Served { socket, control, dir: _dir } = served();
    let mut slow = connect(socket.path());
    for byte in b"{\"command\":\"pause\"}\n" {
        assert!(!control.is_paused());
        slow.write_all(&[*byte]).unwrap();
        assert!(status(socket.path()).stage == super::super::Stage::Preparing);
    }
    assert!(read_answer(&slow).ok && control.is_paused());
}

#[test]
fn a_client_that_never_reads_is_let_go() {
    let Served { socket, dir: _dir, .. } = served();
    let mut deaf = connect(socket.path());
    let line = b"{\"command\":\"status\"}\n".repeat(100);
    let until = Instant::now() + LIMIT;
    while deaf.write_all(&line).is_ok() {
        assert!(Instant::now() < until, "its answers are kept for ever");
    }
    assert!(!status(socket.path()).paused, "others are answered");
}

#[test]
fn many_clients_do_not_keep_others_away() {
    let Served { socket, dir: _dir, .. } = served();
    let idle: Vec<UnixStream> = (0..3 * MOST_CLIENTS).map(|_| connect(socket.path())).collect();
    for _ in 0..10 {
        assert!(!status(socket.path()).paused);
    }
    // The one that came last is still there.
    let mut last = idle.last().unwrap();
    last.write_all(b"{\"command\":\"status\"}\n").unwrap();
    assert!(read_answer(last).ok);
    let threads: Vec<_> = (0..8)
        .map(|_| {
            let path = socket.path().to_owned();
            std::thread::spawn(move || (0..20).for_each(|_| assert!(!status(&path).paused)))
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

#[test]
fn an_end_without_waiting_for_clients() {
    let Served { socket, dir: _dir, .. } = served();
    let waiting = connect(socket.path());
    assert!(!status(socket.path()).paused);
    drop(socket);
    assert_eq!(BufReader::new(&waiting).read_line(&mut String::new()).unwrap(), 0);
}
