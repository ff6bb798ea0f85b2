//! Rules that hold back packets of an address, in tables of our own (nf_tables over netlink, linux/netfilter/nf_tables.h).
//!
//! Without the `nft` program: starting it costs 4 to 25 ms, and what we say to the kernel is the same six messages each time.
//! Each kind of rule has base chains of its own, so that it goes when its chain is emptied, in one message.

use super::netlink::{ACK, APPEND, CREATE, Message, Netlink, text};
use std::io;
use std::net::IpAddr;

const NEW_TABLE: u16 = 0;
const DELETE_TABLE: u16 = 2;
const NEW_CHAIN: u16 = 3;
const NEW_RULE: u16 = 6;
const DELETE_RULE: u16 = 8;
/// `NFNL_SUBSYS_NFTABLES`.
const SUBSYSTEM: u16 = 10;
/// `NFNL_MSG_BATCH_BEGIN`, and END behind it: all of a batch happens, or nothing.
const BATCH_BEGIN: u16 = 0x10;
/// `NFT_TABLE_F_OWNER`: the kernel takes the table away when the socket that made it is closed, and so when its process ends.
const OWNED: u32 = 2;
/// Before connection tracking (-200) and everything that is usual: what is held back has not been here.
const FIRST: i32 = -350;

/// `NFPROTO_INET` (both IP versions in one), and `NFPROTO_ARP`.
const INET: u8 = 1;
const ARP: u8 = 3;
/// Hooks: of IP, `NF_INET_PRE_ROUTING` and `NF_INET_LOCAL_OUT`; of ARP, `NF_ARP_IN` and `NF_ARP_OUT`.
const IP_ARRIVES: u32 = 0;
const IP_LEAVES: u32 = 3;
const ARP_ARRIVES: u32 = 0;
const ARP_LEAVES: u32 = 1;

/// `NFT_META_NFPROTO`: which IP it is; `NFT_META_L4PROTO`.
const META_FAMILY: u32 = 15;
const META_PROTOCOL: u32 = 16;
const NETWORK_HEADER: u32 = 1;
const TRANSPORT_HEADER: u32 = 2;
const DROP: u32 = 0;
const ACCEPT: u32 = 1;
/// Kinds of neighbour discovery: router solicitation to redirect.
const DISCOVERY: std::ops::RangeInclusive<u8> = 133..=137;
const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;

/// What is held back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hold {
    /// At the destination: packets to and from the address, and questions for it. Each ends by itself.
    ///
    /// From it as well: sockets that are made in their repair mode have their timers. What they sent again, or to ask for the state of a window,
    /// before it is known that the program will run here, could be bytes that the source's socket has not sent yet. A client that
    /// has acknowledged those is not listened to any more if the program stays there (RFC 9293, 3.10.7.4).
    Arriving,
    /// At the source: everything to and from the address. The kernel ends it when this process ends.
    Leaving,
}

/// Rules that hold back packets, until this is dropped.
#[derive(Debug)]
pub(crate) struct Filter {
    netlink: Netlink,
    name: String,
    up: bool,
}

/// A chain of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Chain {
    family: u8,
    hook: u32,
    name: &'static str,
}

/// Packets to the address.
const HOLD: Chain = Chain { family: INET, hook: IP_ARRIVES, name: "hold" };
/// Packets from it.
const BLOCK: Chain = Chain { family: INET, hook: IP_LEAVES, name: "block" };
/// Questions for it, of either IP, and answers.
const SILENCE: Chain = Chain { family: INET, hook: IP_ARRIVES, name: "silence" };
const ARP_SILENCE: Chain = Chain { family: ARP, hook: ARP_ARRIVES, name: "silence" };
const ARP_QUIET: Chain = Chain { family: ARP, hook: ARP_LEAVES, name: "quiet" };

impl Filter {
    /// Holds back packets of these addresses from now on, in tables of this name.
    ///
    /// # Errors
    /// What the kernel says: that it has no nf_tables, that we may not, or that there are tables of this name.
    pub(crate) fn up(name: &str, hold: Hold, addresses: &[IpAddr]) -> io::Result<Self> {
        let mut netlink = Netlink::filters()?;
        netlink.ask(batch(rules(name, hold, addresses)))?;
        Ok(Self { netlink, name: name.to_owned(), up: true })
    }

    /// Lets this machine say that it has the addresses.
    pub(crate) fn speak(&mut self) -> io::Result<()> {
        let silent = [SILENCE, ARP_SILENCE, ARP_QUIET].map(|chain| self.emptied(chain));
        self.netlink.ask(batch(silent.into()))
    }

    /// Lets packets to the addresses in, and those from them out.
    pub(crate) fn open(&mut self) -> io::Result<()> {
        let emptied = [HOLD, BLOCK].map(|chain| self.emptied(chain));
        self.netlink.ask(batch(emptied.into()))
    }

    fn emptied(&self, chain: Chain) -> Message {
        // `NFTA_RULE_TABLE` and `NFTA_RULE_CHAIN`, without saying which rule: all of them.
        message(DELETE_RULE, ACK, chain.family).with(1, &text(&self.name)).with(2, &text(chain.name))
    }

    /// Takes the tables away.
    pub(crate) fn down(&mut self) -> io::Result<()> {
        self.up = false;
        self.netlink.ask(batch([INET, ARP].map(|family| deleted(family, &self.name)).into()))
    }
}

impl Drop for Filter {
    fn drop(&mut self) {
        if self.up
            && let Err(error) = self.down()
        {
            tracing::error!(%error, table = self.name, "rules that held packets back are still there");
        }
    }
}

/// Takes tables of this name away; says whether there were any.
pub(crate) fn remove(name: &str) -> io::Result<bool> {
    let mut netlink = Netlink::filters()?;
    let mut any = false;
    for family in [INET, ARP] {
        match netlink.ask(batch(vec![deleted(family, name)])) {
            Ok(()) => any = true,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(any)
}

fn deleted(family: u8, name: &str) -> Message {
    message(DELETE_TABLE, ACK, family).with(1, &text(name))
}

/// `nfgenmsg`: family, version, and a number that only batches use.
fn message(kind: u16, flags: u16, family: u8) -> Message {
    Message::new((SUBSYSTEM << 8) | kind, flags, &[family, 0, 0, 0])
}

fn batch(messages: Vec<Message>) -> Vec<Message> {
    let [high, low] = SUBSYSTEM.to_be_bytes();
    let edge = |kind: u16| Message::new(kind, 0, &[0, 0, high, low]);
    let mut all = vec![edge(BATCH_BEGIN)];
    all.extend(messages);
    all.push(edge(BATCH_BEGIN + 1));
    all
}

/// All of it, from the tables on.
fn rules(name: &str, hold: Hold, addresses: &[IpAddr]) -> Vec<Message> {
    let flags = if hold == Hold::Leaving { OWNED } else { 0 };
    let mut all: Vec<Message> = [INET, ARP]
        .into_iter()
        .map(|family| {
            // `NFTA_TABLE_NAME`, `NFTA_TABLE_FLAGS`; that there is none yet is what makes it ours.
            message(NEW_TABLE, ACK | CREATE | super::netlink::EXCLUSIVE, family)
                .with(1, &text(name))
                .with(2, &flags.to_be_bytes())
        })
        .collect();
    let chains = [SILENCE, HOLD, BLOCK, ARP_SILENCE, ARP_QUIET];
    all.extend(chains.iter().map(|chain| chain_of(name, *chain)));
    let mut rule = |chain: Chain, expressions: Vec<Expression>| all.push(rule_of(name, chain, expressions));
    if addresses.iter().any(IpAddr::is_ipv6) {
        // Neighbours may ask for the address, and see that it is there, while its packets wait.
        for kind in DISCOVERY {
            rule(HOLD, [icmpv6(kind), vec![Expression::Verdict(ACCEPT)]].concat());
            if hold == Hold::Arriving {
                rule(BLOCK, [icmpv6(kind), vec![Expression::Verdict(ACCEPT)]].concat());
            }
        }
    }
    for address in addresses {
        let drop = vec![Expression::Verdict(DROP)];
        match address {
            IpAddr::V4(v4) => {
                let octets = v4.octets().to_vec();
                let at = |offset| same(NETWORK_HEADER, offset, octets.clone());
                rule(HOLD, [family(libc::NFPROTO_IPV4 as u8), at(16), drop.clone()].concat());
                rule(BLOCK, [family(libc::NFPROTO_IPV4 as u8), at(12), drop.clone()].concat());
                // Target and sender of ARP between Ethernet and IPv4.
                rule(ARP_SILENCE, [at(24), drop.clone()].concat());
                rule(ARP_QUIET, [at(14), drop].concat());
            }
            IpAddr::V6(v6) => {
                let octets = v6.octets().to_vec();
                let at = |offset| same(NETWORK_HEADER, offset, octets.clone());
                let target = || same(TRANSPORT_HEADER, 8, octets.clone());
                rule(SILENCE, [icmpv6(SOLICITATION), target(), drop.clone()].concat());
                rule(HOLD, [family(libc::NFPROTO_IPV6 as u8), at(24), drop.clone()].concat());
                if hold == Hold::Leaving {
                    rule(BLOCK, [icmpv6(ADVERTISEMENT), target(), drop.clone()].concat());
                }
                rule(BLOCK, [family(libc::NFPROTO_IPV6 as u8), at(8), drop].concat());
            }
        }
    }
    all
}

fn chain_of(table: &str, chain: Chain) -> Message {
    // The silence comes before the hold, which lets neighbour discovery through.
    let priority = if chain == SILENCE { FIRST - 1 } else { FIRST };
    // `NFTA_CHAIN_TABLE`, `NAME`, `HOOK` (with `HOOKNUM` and `PRIORITY`), `TYPE`.
    message(NEW_CHAIN, ACK | CREATE, chain.family)
        .with(1, &text(table))
        .with(3, &text(chain.name))
        .nest(4, |hook| hook.with(1, &chain.hook.to_be_bytes()).with(2, &priority.to_be_bytes()))
        .with(7, &text("filter"))
}

fn rule_of(table: &str, chain: Chain, expressions: Vec<Expression>) -> Message {
    message(NEW_RULE, ACK | CREATE | APPEND, chain.family)
        .with(1, &text(table))
        .with(2, &text(chain.name))
        // `NFTA_RULE_EXPRESSIONS`: a list of names and data.
        .nest(4, |list| {
            expressions.iter().fold(list, |list, expression| {
                list.nest(1, |element| {
                    element.with(1, &text(expression.name())).nest(2, |data| expression.write(data))
                })
            })
        })
}

/// One step of a rule. A comparison that fails ends the rule.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Expression {
    /// Loads something about the packet.
    Meta(u32),
    /// Loads bytes of the packet: of which header, from where, and how many.
    Payload(u32, u32, u32),
    /// Compares what was loaded.
    Same(Vec<u8>),
    /// Ends the packet's way, or this chain.
    Verdict(u32),
}

impl Expression {
    fn name(&self) -> &'static str {
        match self {
            Self::Meta(_) => "meta",
            Self::Payload(..) => "payload",
            Self::Same(_) => "cmp",
            Self::Verdict(_) => "immediate",
        }
    }

    fn write(&self, data: Message) -> Message {
        /// `NFT_REG_1`, 16 bytes; 0 is the register of verdicts.
        const REGISTER: [u8; 4] = 1u32.to_be_bytes();
        let number = |value: u32| value.to_be_bytes();
        match self {
            Self::Meta(key) => data.with(1, &REGISTER).with(2, &number(*key)),
            Self::Payload(base, offset, len) => data
                .with(1, &REGISTER)
                .with(2, &number(*base))
                .with(3, &number(*offset))
                .with(4, &number(*len)),
            // Operation 0 is equality.
            Self::Same(value) => {
                data.with(1, &REGISTER).with(2, &number(0)).nest(3, |inner| inner.with(1, value))
            }
            Self::Verdict(code) => data
                .with(1, &number(0))
                .nest(2, |inner| inner.nest(2, |verdict| verdict.with(1, &number(*code)))),
        }
    }
}

fn family(family: u8) -> Vec<Expression> {
    vec![Expression::Meta(META_FAMILY), Expression::Same(vec![family])]
}

fn icmpv6(kind: u8) -> Vec<Expression> {
    let mut all = family(libc::NFPROTO_IPV6 as u8);
    all.extend([Expression::Meta(META_PROTOCOL), Expression::Same(vec![super::checksum::ICMPV6])]);
    all.extend(same(TRANSPORT_HEADER, 0, vec![kind]));
    all
}

fn same(base: u32, offset: u32, bytes: Vec<u8>) -> Vec<Expression> {
    vec![Expression::Payload(base, offset, bytes.len() as u32), Expression::Same(bytes)]
}
