//! The steps as the kernel takes them, between two network namespaces. They need root, as a migration does.

use super::addresses;
use super::arriving::Arriving;
use super::filter;
use super::ground::{Ground, Machine, Step, of_destination, of_source};
use super::leaving::Leaving;
use nix::sched::{CloneFlags, unshare};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::process::Command;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(60);

fn run(command: &str) -> String {
    let output = Command::new("/bin/sh").args(["-c", command]).output().expect("a shell");
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A thread in a network namespace of its own does what it is told, one thing after another.
struct Site {
    jobs: Sender<Box<dyn FnOnce() + Send>>,
    path: String,
}

impl Site {
    fn new() -> Self {
        let (jobs, todo) = channel::<Box<dyn FnOnce() + Send>>();
        let (said, path) = channel();
        std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).expect("this test makes network namespaces, which needs root");
            run("ip link set lo up");
            said.send(format!("/proc/{}/task/{}/ns/net", std::process::id(), nix::unistd::gettid())).unwrap();
            todo.into_iter().for_each(|job| job());
        });
        let path = path.recv().expect("this test makes network namespaces, which needs root");
        Self { jobs, path }
    }

    /// Runs something there and waits for it.
    fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let (result, answer): (Sender<T>, Receiver<T>) = channel();
        self.jobs.send(Box::new(move || drop(result.send(job())))).unwrap();
        answer.recv().expect("the site has panicked")
    }
}

/// A machine and a client, and a wire between them.
fn wire() -> (Site, Site) {
    let (machine, client) = (Site::new(), Site::new());
    let path = client.path.clone();
    machine.run(move || {
        run(&format!("ip link add eth0 type veth peer name eth0 netns {path}"));
        run("ip address add 10.9.0.2/24 dev eth0; ip address add 2001:db8:9::2/64 dev eth0 nodad; ip link set eth0 up");
    });
    client.run(|| {
        run("ip address add 10.9.0.3/24 dev eth0; ip address add 2001:db8:9::3/64 dev eth0 nodad; ip link set eth0 up");
    });
    (machine, client)
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !done() {
        assert!(Instant::now() < end, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What the client knows of where an address is.
fn neighbour(client: &Site, address: IpAddr) -> String {
    client.run(move || run(&format!("ip neigh show {address}")))
}

fn send(client: &Site, to: SocketAddr, words: &'static [&'static str]) {
    client.run(move || {
        let any: SocketAddr = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }.parse().unwrap();
        let socket = UdpSocket::bind(any).unwrap();
        for word in words {
            socket.send_to(word.as_bytes(), to).unwrap();
        }
    });
}

fn comes(address: IpAddr, name: &'static str) {
    let (machine, client) = wire();
    let to = SocketAddr::new(address, 9);
    let prefix = if address.is_ipv4() { 24 } else { 64 };
    let peer: SocketAddr =
        if address.is_ipv4() { "10.9.0.3:9" } else { "[2001:db8:9::3]:9" }.parse().unwrap();
    let mut arriving = machine.run(move || {
        let owner = [2, 0, 0, 0, 0, 7];
        let place = of_destination(address, prefix, "eth0", owner).unwrap();
        let mut arriving = Arriving::new(Machine::destination(name.to_owned(), vec![place]));
        arriving.prepare().unwrap();
        assert!(
            of_destination(address, prefix, "eth0", owner)
                .unwrap_err()
                .to_string()
                .contains("already, on eth0")
        );
        arriving
    });
    let server = machine.run(move || UdpSocket::bind(to).expect("the address is there to be bound to"));

    // Silent: the client asks for it, and nobody answers.
    send(&client, to, &["too early"]);
    until("giving up", || neighbour(&client, address).contains("FAILED"));

    arriving = machine.run(move || {
        arriving.announce().unwrap();
        arriving
    });
    // Announced: the client knows where, or is told when it asks; what it sends waits.
    send(&client, to, &["one", "two", "three"]);
    until("being found", || {
        send(&client, to, &["four"]);
        let known = neighbour(&client, address);
        known.contains("lladdr") && !known.contains("FAILED")
    });
    let arriving = machine.run(move || {
        let server = server;
        server.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let mut buffer = [0; 100];
        assert!(server.recv(&mut buffer).is_err(), "nothing gets in before the program runs");
        let error = server.send_to(b"early", peer).expect_err("nothing gets out before the program runs");
        assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied, "{error}");
        let started = Instant::now();
        arriving.open().unwrap();
        let opened = started.elapsed();
        server.send_to(b"now", peer).expect("what the kernel says as the program begins to run");
        arriving.deliver().unwrap();
        let delivered = arriving.ground().delivered();
        assert!(delivered.packets > 0 && delivered.bytes > 0 && delivered.lost == 0, "{delivered:?}");
        server.set_read_timeout(Some(LIMIT)).unwrap();
        for _ in 0..delivered.packets {
            let (got, from) = server.recv_from(&mut buffer).unwrap();
            let word = String::from_utf8_lossy(&buffer[..got]).into_owned();
            assert!(["one", "two", "three", "four"].contains(&word.as_str()), "{word} from {from}");
        }
        assert!(opened < LIMIT);
        arriving.settle().unwrap();
        assert!(!filter::remove(name).unwrap(), "the rules are gone");
        assert!(addresses::list().unwrap().iter().any(|placed| placed.address == address));
        server
    });
    // And from now on as any other.
    send(&client, to, &["later"]);
    machine.run(move || {
        let mut buffer = [0; 100];
        until("what came later", || {
            let (got, _) = arriving.recv_from(&mut buffer).unwrap();
            &buffer[..got] == b"later"
        });
    });
}

#[test]
fn an_ipv4_address_comes_silently_and_what_was_sent_to_it_is_delivered() {
    comes("10.9.0.9".parse().unwrap(), "pageferry-test-v4");
}

#[test]
fn an_ipv6_address_comes_silently_and_what_was_sent_to_it_is_delivered() {
    comes("2001:db8:9::9".parse().unwrap(), "pageferry-test-v6");
}

#[test]
fn nothing_is_left_of_an_address_that_did_not_come_and_its_owner_is_announced() {
    let (machine, client) = wire();
    let address: IpAddr = "10.9.0.9".parse().unwrap();
    machine.run(move || {
        let place = of_destination(address, 24, "eth0", [2, 0, 0, 0, 0, 7]).unwrap();
        let mut arriving = Arriving::new(Machine::destination("pageferry-test-undo".to_owned(), vec![place]));
        arriving.prepare().unwrap();
        run("test $(ip neigh show 10.9.0.9 | wc -l) = 0");
        arriving.announce().unwrap();
    });
    // It was dropped, after the announcement: the client hears of both, if it knew the address at all.
    send(&client, SocketAddr::new(address, 9), &["where"]);
    machine.run(move || {
        assert!(!filter::remove("pageferry-test-undo").unwrap());
        assert!(addresses::list().unwrap().iter().all(|placed| placed.address != address));
        assert_eq!(run("nft list ruleset 2>/dev/null || true"), "");
    });
}

#[test]
fn an_address_that_leaves_says_nothing_and_comes_back() {
    let (machine, client) = wire();
    let address: IpAddr = "10.9.0.2".parse().unwrap();
    let listener = machine.run(|| std::net::TcpListener::bind("10.9.0.2:9").unwrap());
    let reached = |patience: Duration| {
        client.run(move || {
            std::net::TcpStream::connect_timeout(&"10.9.0.2:9".parse().unwrap(), patience).is_ok()
        })
    };
    assert!(reached(LIMIT));
    let mut leaving = machine.run(move || {
        // A second one of the same network, which the kernel may take away with the first.
        run("ip address add 10.9.0.8/24 dev eth0");
        let place = of_source(address, 24, "eth0").unwrap();
        let mut leaving = Leaving::new(Machine::source("pageferry-test-leave".to_owned(), vec![place]));
        leaving.announced();
        leaving.block().unwrap();
        leaving
    });
    assert!(!reached(Duration::from_secs(1)));
    machine.run(move || {
        leaving.remove().unwrap();
        let list = addresses::list().unwrap();
        assert!(list.iter().all(|placed| placed.address != address), "{list:?}");
        assert!(list.iter().any(|placed| placed.address.to_string() == "10.9.0.8"), "{list:?}");
        leaving.take_back().unwrap();
        assert!(!filter::remove("pageferry-test-leave").unwrap());
    });
    assert!(reached(LIMIT));
    drop(listener);
}

#[test]
fn the_rules_of_a_source_end_with_their_socket() {
    let (machine, _client) = wire();
    machine.run(|| {
        let place = of_source("10.9.0.2".parse().unwrap(), 24, "eth0").unwrap();
        let mut ground = Machine::source("pageferry-test-owned".to_owned(), vec![place]);
        ground.take(Step::Hold).unwrap();
        // Nobody else can take them away while it lives, and as the process ends they go by themselves.
        let error = filter::remove("pageferry-test-owned").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EPERM));
        ground.take(Step::Lift).unwrap();
        assert!(!filter::remove("pageferry-test-owned").unwrap());
    });
}

#[test]
fn what_cannot_be_moved_is_said_before() {
    let (machine, _client) = wire();
    machine.run(|| {
        let address: IpAddr = "10.9.0.2".parse().unwrap();
        let says = |result: Result<_, super::NetworkError>| match result {
            Err(error) => error.to_string(),
            Ok(place) => panic!("{place:?} can be moved"),
        };
        assert!(says(of_source(address, 24, "eth7")).contains("no network device eth7"));
        assert!(says(of_source(address, 24, "lo")).contains("eth0 has it"));
        assert!(says(of_source(address, 16, "eth0")).contains("length 24, not 16"));
        assert!(says(of_source("10.9.0.77".parse().unwrap(), 24, "eth0")).contains("does not have"));
        assert!(says(of_destination("10.9.0.9".parse().unwrap(), 24, "lo", [0; 6])).contains("Ethernet"));
    });
}
