//! Established connections and the address that they have: they move with the program, and come back with it, and nothing of
//! the moving is left.

use super::Test;
use super::ferry::{Ferry, Ignored, LIMIT, Receiver, succeed};
use super::recover::{finds, forget, kill_engine, writes};
use anyhow::{Context, bail, ensure};
use pageferry_benches::bench::hosts::Host;
use pageferry_benches::connections::client::Seen;
use pageferry_benches::redis::load::LoadReport;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

pub fn tests() -> Vec<(&'static str, Test)> {
    vec![
        ("connections of every kind move with their addresses, there and back", there_and_back),
        ("connections go on when the receiving engine dies before the commit", destination_dies),
        ("connections go on when the sending engine dies before the commit", source_dies),
        ("connections go on when the sending engine dies and has taken the address away", recovered),
        ("connections go on when the sending engine dies and owes pages", recovered_late),
        ("connections go on when the sending engine dies as it sends the commit", recovered_there),
        ("connections go on after an interrupted migration", interrupted),
        ("connections that nobody moves are refused, or closed when that is asked for", refused),
        ("addresses that cannot move are refused", cannot_move),
        ("hooks move an address, and one that fails undoes it", hooks),
        ("redis under writes moves with its address, and its client never connects again", redis),
    ]
}

const V4: &str = "10.77.0.9";
const V6: &str = "fd77::9";
const MOVE_V4: [&str; 2] = ["--move-address", "10.77.0.9/24@eth0"];
const MOVE_V6: [&str; 2] = ["--move-address", "fd77::9/64@eth0"];
const BACK: &str = "10.77.0.1:7077";

/// A server with addresses of its own, and a client with connections of every kind to it.
struct Service<'a> {
    ferry: &'a Ferry,
    pid: i32,
    client: Child,
    state: PathBuf,
    last: Seen,
}

impl<'a> Service<'a> {
    fn start(ferry: &'a Ferry, addresses: &[&str], idle: usize) -> anyhow::Result<Self> {
        Self::start_bound(ferry, addresses, addresses, idle)
    }

    /// The server listens on `bound`, and the client uses it by `addresses`.
    fn start_bound(
        ferry: &'a Ferry,
        bound: &[&str],
        addresses: &[&str],
        idle: usize,
    ) -> anyhow::Result<Self> {
        for (host, own) in [(Host::Source, 1), (Host::Destination, 2), (Host::Client, 3)] {
            ferry.sh(host, &format!("ip address replace fd77::{own}/64 dev eth0 nodad"))?;
            ferry.sh(host, &format!("ip address del {V4}/24 dev eth0; ip address del {V6}/64 dev eth0"))?;
        }
        // Where the address was in the test before.
        ferry.sh(Host::Client, "ip neigh flush dev eth0; true")?;
        ferry.sh(
            Host::Source,
            &format!("ip address add {V4}/24 dev eth0; ip address add {V6}/64 dev eth0 nodad"),
        )?;
        let workload = PathBuf::from(env!("CARGO_BIN_EXE_pageferry")).with_file_name("pageferry-workload");
        let workload = workload.to_str().context("a path of text")?;
        let end = |address: &&str| match address.contains(':') {
            true => format!("[{address}]:7000"),
            false => format!("{address}:7000"),
        };
        let ends: Vec<String> = addresses.iter().map(end).collect();
        let bound: Vec<String> = bound.iter().map(end).collect();
        let mut serve = vec![workload, "serve"];
        bound.iter().for_each(|end| serve.extend(["--listen", end]));
        let pid = ferry.program(&serve)?;
        let state = ferry.scratch.path().join(ferry.name("connections"));
        let (path, idle) = (state.to_str().context("a path of text")?, idle.to_string());
        let until = Instant::now() + LIMIT;
        while ferry.sh(Host::Source, "ss -Hltn 2>/dev/null | grep -c :7000 || true")?
            != bound.len().to_string()
        {
            ensure!(Instant::now() < until, "the server does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        let mut client = vec![workload, "use", "--state", path, "--idle", &idle];
        ends.iter().for_each(|end| client.extend(["--address", end]));
        let client = ferry
            .hosts
            .exec(Host::Client, client)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let mut service = Self { ferry, pid, client, state, last: Seen::default() };
        service.goes_on().context("before anything moves")?;
        Ok(service)
    }

    fn seen(&self) -> Seen {
        let text = std::fs::read(&self.state).unwrap_or_default();
        serde_json::from_slice(&text).unwrap_or_default()
    }

    /// How the kernels see the connections, for somebody who asks why one does not go on.
    fn sockets(&self) -> String {
        let mut text = String::new();
        for host in [Host::Source, Host::Destination, Host::Client] {
            let seen = self.ferry.sh(host, "ss -Htinoe '( sport = :7000 or dport = :7000 )' 2>&1; true");
            text += &format!("\n{}:\n{}", host.name(), seen.unwrap_or_else(|error| error.to_string()));
        }
        text
    }

    /// Waits until every kind of connection has done more than it had when this was asked.
    fn goes_on(&mut self) -> anyhow::Result<()> {
        let (before, until) = (self.seen(), Instant::now() + LIMIT);
        loop {
            let now = self.seen();
            ensure!(now.errors.is_empty(), "{:?}; {}", now.errors, self.sockets());
            let more = [
                now.echoes >= before.echoes + 20,
                now.bulk_bytes >= before.bulk_bytes + (4 << 20),
                now.upload_bytes >= before.upload_bytes + (4 << 20),
                now.ticks >= before.ticks + 10,
                now.fresh >= before.fresh + 3,
            ];
            if more.iter().all(|more| *more) {
                self.last = now;
                return Ok(());
            }
            if Instant::now() > until {
                bail!(
                    "echo, bulk, upload, ticks, fresh: {more:?}; {before:?} became {now:?}; {}",
                    self.sockets()
                );
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Has the client say its last word: the idle connections are used now.
    fn end(mut self, idle: u64) -> anyhow::Result<()> {
        let mut end = self.state.clone().into_os_string();
        end.push(".end");
        std::fs::write(end, "")?;
        let until = Instant::now() + LIMIT;
        while self.client.try_wait()?.is_none() {
            ensure!(Instant::now() < until, "the client does not end: {:?}", self.seen());
            std::thread::sleep(Duration::from_millis(10));
        }
        let seen = self.seen();
        ensure!(
            seen.ended && seen.errors.is_empty() && seen.idle == idle,
            "the client's last words: {seen:?}"
        );
        Ok(())
    }

    /// Which hosts have an address.
    fn has(&self, address: &str) -> anyhow::Result<Vec<&'static str>> {
        let mut found = Vec::new();
        for host in [Host::Source, Host::Destination] {
            if self.ferry.sh(host, "ip -o address show dev eth0")?.contains(&format!(" {address}/")) {
                found.push(host.name());
            }
        }
        Ok(found)
    }
}

impl Drop for Service<'_> {
    fn drop(&mut self) {
        let _ = self.client.kill();
        let _ = self.client.wait();
        for host in [Host::Source, Host::Destination] {
            let script = format!(
                "kill -KILL {}; ip address del {V4}/24 dev eth0; ip address del {V6}/64 dev eth0; true",
                self.pid
            );
            let _ = self.ferry.sh(host, &script);
        }
    }
}

fn log_has(receiver: &Receiver, text: &str) -> anyhow::Result<()> {
    let until = Instant::now() + LIMIT;
    while !receiver.log().contains(text) {
        ensure!(Instant::now() < until, "no {text:?}: {}", receiver.log());
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn there_and_back(ferry: &Ferry) -> anyhow::Result<()> {
    let mut service = Service::start(ferry, &[V4, V6], 100)?;
    let options = [&MOVE_V4[..], &MOVE_V6, &["--verify"]].concat();
    for (from, to, listen) in
        [(Host::Source, Host::Destination, "10.77.0.2:7077"), (Host::Destination, Host::Source, BACK)]
    {
        let receiver = ferry.receiver_in(to, listen, None, &["--once"])?;
        let outcome = ferry.migrate_from(from, service.pid, listen, None, &options)?.wait()?;
        let report = outcome.moved().with_context(|| format!("the receiver: {}", receiver.log()))?;
        service.goes_on().with_context(|| format!("after the move to {}", to.name()))?;
        ensure!(receiver.wait()? == 0, "the receiver's exit code");
        for address in [V4, V6] {
            ensure!(service.has(address)? == [to.name()], "{address} is at {:?}", service.has(address)?);
        }
        let network = report.network.as_ref().context("the report says nothing of the network")?;
        ensure!(report.tcp == "kept" && network.connections >= 208, "{:?}", network);
        ensure!(network.held_packets > 0 && network.lost_packets == 0, "nothing waited: {network:?}");
        ensure!(network.away_us > 0 && network.announce_us > 0 && network.release_us > 0, "{network:?}");
        // A request waits for the downtime, and not for a timer of its sender: those double with each try.
        let gap = service.last.longest_us;
        let downtime = report.downtime_us.total.max(network.away_us);
        ensure!(gap < 4 * downtime, "a request took {gap} us, the downtime was {downtime} us; {network:?}");
        ferry.nothing_is_left()?;
    }
    service.end(200)
}

fn destination_dies(ferry: &Ferry) -> anyhow::Result<()> {
    let mut service = Service::start(ferry, &[V4], 5)?;
    for phase in ["dest-round", "dest-announce", "dest-restore", "dest-ready"] {
        (|| {
            let receiver = ferry.receiver(Some(&format!("{phase}=kill")), &[])?;
            let options = [&MOVE_V4[..], &["--resume-timeout", "0s"]].concat();
            let outcome = ferry.migrate(service.pid, None, &options)?;
            ensure!(outcome.code != 0 && outcome.err.contains("running at the source"), "{}", outcome.err);
            ensure!(receiver.wait()? == 137, "the receiver did not reach the fault");
            // What the dead one left is taken away by the next that starts.
            let next = ferry.receiver(None, &[])?;
            log_has(&next, "an engine that died had left")?;
            next.stop()?;
            ensure!(service.has(V4)? == ["source"], "it is at {:?}", service.has(V4)?);
            service.goes_on()?;
            ferry.nothing_is_left()
        })()
        .with_context(|| format!("killed at {phase}"))?;
    }
    service.end(5)
}

fn source_dies(ferry: &Ferry) -> anyhow::Result<()> {
    let mut service = Service::start(ferry, &[V4], 5)?;
    let receiver = ferry.receiver(None, &[])?;
    for phase in ["precopy", "frozen", "dump", "ready"] {
        (|| {
            // Held for a source that comes back, the address would stay at the destination as well, unseen, for a while.
            let options = [&MOVE_V4[..], &["--resume-timeout", "0s"]].concat();
            let outcome = ferry.migrate(service.pid, Some(&format!("{phase}=kill")), &options)?;
            ensure!(outcome.code == 137, "exit code {}: {}", outcome.code, outcome.err);
            service.goes_on()?;
            ensure!(service.has(V4)? == ["source"], "it is at {:?}", service.has(V4)?);
            Ok(())
        })()
        .with_context(|| format!("killed at {phase}"))?;
    }
    // The receiver has undone its part each time, and takes the next.
    ferry.migrate(service.pid, None, &MOVE_V4)?.moved()?;
    service.goes_on()?;
    receiver.stop()?;
    service.end(5)
}

/// Prints how many IP packets from the address leave this host within three seconds: more than a restored socket waits before it says
/// something again (a second).
const LISTEN: &str = "python3 -I -c '
import select, socket, time
s = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))
s.bind((\"eth0\", 0))
ip, end, seen = socket.inet_aton(\"10.77.0.9\"), time.monotonic() + 3, 0
while select.select([s], [], [], max(0, end - time.monotonic()))[0]:
    packet, (_, protocol, kind, _, _) = s.recvfrom(65536)
    seen += kind == socket.PACKET_OUTGOING and protocol == 0x800 and packet[12:16] == ip
print(seen)
'";

/// The commit is on its way, and the address has gone with it: `pageferry recover` gives it back with the program. Until the commit has
/// arrived nobody hears of the sockets that are at the destination: what those said, the ones that go on at the source may never have.
fn recovered(ferry: &Ferry) -> anyhow::Result<()> {
    forget(ferry)?;
    let mut service = Service::start(ferry, &[V4], 5)?;
    let receiver = ferry.receiver(Some("dest-commit=delay:10000"), &[])?;
    let migration = ferry.migrate_start(service.pid, None, &MOVE_V4)?;
    writes(ferry, Host::Source, "committing")?;
    let until = Instant::now() + LIMIT;
    while service.has(V4)?.contains(&"source") {
        ensure!(Instant::now() < until, "the address is not taken away");
        std::thread::sleep(Duration::from_millis(10));
    }
    let said = ferry.sh(Host::Destination, LISTEN)?;
    ensure!(said == "0", "{said} packets of the program left the destination before the commit");
    kill_engine(ferry, Host::Source)?;
    ensure!(migration.wait()?.code == 137, "the engine was not killed");
    let says = "its addresses are here: 10.77.0.9/24@eth0";
    finds(ferry, Host::Source, "--timeout 30s", 0, says)?;
    service.goes_on()?;
    receiver.stop()?;
    ensure!(service.has(V4)? == ["source"], "it is at {:?}", service.has(V4)?);
    ferry.nothing_is_left()?;
    service.end(5)
}

/// The server waits for its pages, and its clients for it, until `pageferry recover` sends them; the copy here ends without a word to anybody.
fn recovered_late(ferry: &Ferry) -> anyhow::Result<()> {
    forget(ferry)?;
    let mut service = Service::start(ferry, &[V4], 5)?;
    let receiver = ferry.receiver(None, &["--once"])?;
    let options = [&MOVE_V4[..], &["--strategy", "post-copy"]].concat();
    let outcome = ferry.migrate(service.pid, Some("post-copy=kill"), &options)?;
    ensure!(outcome.code == 137, "exit code {}: {}", outcome.code, outcome.err);
    // As if it had been killed between the commit and the next step.
    ferry.sh(Host::Source, &format!("ip address add {V4}/24 dev eth0"))?;
    ensure!(service.has(V4)?.len() == 2, "it is at {:?}", service.has(V4)?);
    finds(ferry, Host::Source, "", 0, "was sent what it was owed")?;
    service.goes_on()?;
    ensure!(service.has(V4)? == ["destination"], "it is at {:?}", service.has(V4)?);
    ensure!(ferry.state(Host::Source, service.pid)?.is_none(), "it is left at the source");
    ensure!(receiver.wait()? == 0, "the receiver's exit code");
    ferry.nothing_is_left()?;
    service.goes_on()?;
    service.end(5)
}

/// Nothing is owed: the destination says that all is there. The engine was killed before it had taken the address away, or when the copy here
/// was to be ended and somebody has put the address back.
fn recovered_there(ferry: &Ferry) -> anyhow::Result<()> {
    for point in ["commit-sent", "filled"] {
        (|| {
            forget(ferry)?;
            let mut service = Service::start(ferry, &[V4], 5)?;
            let receiver = ferry.receiver(None, &[])?;
            let outcome = ferry.migrate(service.pid, Some(&format!("{point}=kill")), &MOVE_V4)?;
            ensure!(outcome.code == 137, "exit code {}: {}", outcome.code, outcome.err);
            if point == "filled" {
                ferry.sh(Host::Source, &format!("ip address add {V4}/24 dev eth0"))?;
            }
            let would = "what is still here would be taken away: 10.77.0.9/24@eth0";
            finds(ferry, Host::Source, "--dry-run --timeout 30s", 0, would)?;
            ensure!(service.has(V4)?.len() == 2, "it is at {:?}", service.has(V4)?);
            let says = "taken away here, because the program has it there: 10.77.0.9/24 of eth0";
            finds(ferry, Host::Source, "--timeout 30s", 0, says)?;
            ensure!(service.has(V4)? == ["destination"], "it is at {:?}", service.has(V4)?);
            service.goes_on()?;
            ensure!(ferry.state(Host::Source, service.pid)?.is_none(), "it is left at the source");
            receiver.stop()?;
            ferry.nothing_is_left()?;
            service.goes_on()?;
            service.end(5)
        })()
        .with_context(|| point)?;
    }
    Ok(())
}

fn interrupted(ferry: &Ferry) -> anyhow::Result<()> {
    let mut service = Service::start(ferry, &[V4], 5)?;
    let receiver = ferry.receiver(None, &[])?;
    for fault in ["precopy=delay:3000", "frozen=delay:1000", "ready=delay:1000"] {
        let mut migration = ferry.migrate_start(service.pid, Some(fault), &MOVE_V4)?;
        migration.says("a scripted fault").or_else(|_| migration.says("tracking"))?;
        migration.signal(nix::sys::signal::Signal::SIGINT)?;
        migration.wait()?.failed(130, &["interrupted"])?;
        service.goes_on().context(fault)?;
    }
    receiver.stop()?;
    ensure!(service.has(V4)? == ["source"], "it is at {:?}", service.has(V4)?);
    ferry.nothing_is_left()?;
    service.end(5)
}

fn refused(ferry: &Ferry) -> anyhow::Result<()> {
    let service = Service::start_bound(ferry, &["0.0.0.0"], &[V4], 5)?;
    let receiver = ferry.receiver(None, &[])?;
    let outcome = ferry.migrate(service.pid, None, &[])?;
    let words = [
        "established TCP connections, such as 10.77.0.9:7000 to 10.77.0.3:",
        "--move-address",
        "--tcp close",
    ];
    outcome.failed(3, &words)?;
    let outcome = ferry.migrate(service.pid, None, &MOVE_V6)?;
    outcome.failed(3, &["not from an address that moves", "--move-address"])?;
    let outcome = ferry.migrate(service.pid, None, &["--tcp", "close"])?;
    let report = outcome.moved()?;
    ensure!(report.tcp == "closed" && report.network.is_none(), "{:?}", report.network);
    ensure!(service.has(V4)? == ["source"], "nobody asked for it to move");
    receiver.stop()
}

fn cannot_move(ferry: &Ferry) -> anyhow::Result<()> {
    let mut service = Service::start(ferry, &[V4], 1)?;
    let receiver = ferry.receiver(None, &[])?;
    for (moved, words) in [
        ("10.77.0.9/24@eth7", "no network device eth7"),
        ("10.77.0.9/24@lo", "eth0 has it"),
        ("10.77.0.9/16@eth0", "with the length 24, not 16"),
        ("10.77.0.99/24@eth0", "does not have the address 10.77.0.99"),
        ("10.77.0.9/24@eth0:eth7", "no network device eth7"),
        ("10.77.0.9/24@eth0:lo", "no Ethernet address"),
    ] {
        ferry.migrate(service.pid, None, &["--move-address", moved])?.failed(3, &[words]).context(moved)?;
    }
    // The address that this migration itself comes from.
    let own = ["--move-address", "10.77.0.9/24@eth0", "--move-address", "10.77.0.1/24@eth0"];
    ferry.migrate(service.pid, None, &own)?.failed(3, &["comes from 10.77.0.1, which is to move"])?;
    ferry.sh(Host::Destination, "ip address add 10.77.0.9/32 dev lo")?;
    ferry.migrate(service.pid, None, &MOVE_V4)?.failed(3, &["has the address 10.77.0.9 already, on lo"])?;
    ferry.sh(Host::Destination, "ip address del 10.77.0.9/32 dev lo")?;
    service.goes_on()?;
    receiver.stop()?;
    service.end(1)
}

/// Tells everybody that the address is here, as a network's own controller would.
const ANNOUNCE: &str = "python3 -I -c '
import fcntl, socket, struct
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
s.bind((\"eth0\", 0))
mac = s.getsockname()[4]
ip = socket.inet_aton(\"10.77.0.9\")
for form in (1, 2):
    s.send(b\"\\xff\" * 6 + mac + struct.pack(\"!HHHBBH\", 0x806, 1, 0x800, 6, 4, form) + mac + ip + mac + ip)
'";

fn hooks(ferry: &Ferry) -> anyhow::Result<()> {
    let mut service = Service::start(ferry, &[V4], 5)?;
    let told = ferry.scratch.path().join(ferry.name("hooks"));
    let tell = format!("echo $PAGEFERRY_SIDE $PAGEFERRY_STAGE $PAGEFERRY_ADDRESSES >> {}", told.display());
    let put = format!("{tell}; ip address add 10.77.0.9/24 dev eth0");
    let announce = format!("{tell}; {ANNOUNCE}");
    let take_away = format!("{tell}; ip address del 10.77.0.9/24 dev eth0");
    let there = [
        ["--hook-prepare", &put],
        ["--hook-before-freeze", &announce],
        ["--hook-after-resume", &tell],
        ["--hook-rollback", &take_away],
    ]
    .concat();
    let receiver = ferry.receiver(None, &there)?;

    // One that fails when it has been half done.
    let failing =
        ["--tcp", "keep", "--hook-before-freeze", "echo out of order; false", "--hook-rollback", &announce];
    let outcome = ferry.migrate(service.pid, None, &failing)?;
    outcome.failed(1, &["before-freeze hook failed", "out of order", "running at the source"])?;
    service.goes_on()?;
    let until = Instant::now() + LIMIT;
    while service.has(V4)? != ["source"] {
        ensure!(Instant::now() < until, "it is at {:?}", service.has(V4)?);
        std::thread::sleep(Duration::from_millis(20));
    }

    let working = ["--tcp", "keep", "--hook-before-freeze", &tell, "--hook-after-resume", &take_away];
    let outcome = ferry.migrate(service.pid, None, &working)?;
    let report = outcome.moved().with_context(|| format!("the receiver: {}", receiver.log()))?;
    let network = report.network.as_ref().context("the report says nothing of the network")?;
    ensure!(network.addresses == [V4] && network.connections >= 9, "{network:?}");
    service.goes_on()?;
    ensure!(service.has(V4)? == ["destination"], "it is at {:?}", service.has(V4)?);
    receiver.stop()?;
    let told = std::fs::read_to_string(told)?;
    for line in [
        "destination prepare 10.77.0.9",
        "destination before-freeze 10.77.0.9",
        "destination after-resume 10.77.0.9",
        "destination rollback 10.77.0.9",
        "source before-freeze 10.77.0.9",
        "source after-resume 10.77.0.9",
        "source rollback 10.77.0.9",
    ] {
        ensure!(told.lines().any(|told| told == line), "no {line:?} in {told}");
    }
    service.end(5)
}

fn redis(ferry: &Ferry) -> anyhow::Result<()> {
    if !Path::new("/usr/bin/redis-server").exists() {
        return Err(Ignored("no redis-server here".to_owned()).into());
    }
    let workload = PathBuf::from(env!("CARGO_BIN_EXE_pageferry")).with_file_name("pageferry-workload");
    let workload = workload.to_str().context("a path of text")?;
    let scratch = ferry.scratch.path().to_str().context("a path of text")?;
    ferry.sh(Host::Client, "ip neigh flush dev eth0; true")?;
    ferry.sh(Host::Source, &format!("ip address add {V4}/24 dev eth0"))?;
    let server =
        ["redis-server", "--bind", "0.0.0.0", "--protected-mode", "no", "--save", "", "--appendonly", "no"];
    let server = ferry.program(&[&server[..], &["--dir", scratch]].concat())?;
    let address = format!("{V4}:6379");
    let fill = [workload, "redis-fill", "--address", &address, "--bytes", "48MiB"];
    succeed(ferry.hosts.exec(Host::Client, fill).output()?).context("filling redis")?;
    let (journal, report) =
        (format!("{scratch}/{}", ferry.name("journal")), format!("{scratch}/{}", ferry.name("load")));
    let state = format!("{scratch}/{}", ferry.name("load-state"));
    let mut load = vec![workload, "redis-load", "--address", &address, "--rate", "2000", "--state", &state];
    load.extend(["--journal", &journal, "--report", &report, "--duration", "8"]);
    let load = ferry
        .hosts
        .exec(Host::Client, load)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let connected = || ferry.sh(Host::Source, "ss -Htn state established | grep -c :6379 || true");
    let until = Instant::now() + LIMIT;
    while connected()? == "0" {
        ensure!(Instant::now() < until, "the client does not connect");
        std::thread::sleep(Duration::from_millis(20));
    }
    let receiver = ferry.receiver(None, &["--once"])?;
    let outcome = ferry.migrate(server, None, &[&MOVE_V4[..], &["--verify"]].concat())?;
    let loaded = load.wait_with_output()?;
    let moved = outcome.moved()?;
    ensure!(moved.network.as_ref().is_some_and(|network| network.connections > 0), "{:?}", moved.network);
    receiver.wait()?;
    succeed(loaded).context("the client")?;
    let seen: LoadReport = serde_json::from_str(&std::fs::read_to_string(&report)?)?;
    ensure!(seen.reconnects == 0 && seen.bad_reads == 0 && seen.acknowledged > 0, "{seen:?}");
    let verify = [workload, "redis-verify", "--address", &address, "--bytes", "48MiB", "--journal", &journal];
    succeed(ferry.hosts.exec(Host::Client, verify).output()?).context("looking for every key")?;
    ferry.sh(Host::Destination, &format!("ip address del {V4}/24 dev eth0"))?;
    ensure!(ferry.state(Host::Source, server)?.is_none(), "redis still runs at the source");
    Ok(())
}
