//! Values as a web application keeps them for who is logged in: JSON with ids, names, times, addresses and random tokens.
//! Neither constant nor noise: words come from short lists, tokens and numbers from the key's own random numbers.

use crate::workload::content::{Random, mix};
use std::fmt::Write;

const NAMES: [&str; 16] = [
    "Ada",
    "Grace",
    "Edsger",
    "Barbara",
    "Donald",
    "Frances",
    "Alan",
    "Hedy",
    "Niklaus",
    "Radia",
    "Ken",
    "Karen",
    "Dennis",
    "Shafi",
    "Leslie",
    "Katherine",
];
const FAMILIES: [&str; 16] = [
    "Lovelace",
    "Hopper",
    "Dijkstra",
    "Liskov",
    "Knuth",
    "Allen",
    "Turing",
    "Lamarr",
    "Wirth",
    "Perlman",
    "Thompson",
    "Jones",
    "Ritchie",
    "Goldwasser",
    "Lamport",
    "Johnson",
];
const AGENTS: [&str; 4] = [
    "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0",
    "Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/605.1.15 (KHTML, like Gecko) Version/17.5 Safari/605.1.15",
    "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/126.0.0.0 Safari/537.36",
    "Mozilla/5.0 (iPhone; CPU iPhone OS 17_5 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) Mobile/15E148",
];
const PATHS: [&str; 8] = [
    "/",
    "/search",
    "/cart",
    "/account/orders",
    "/account/settings",
    "/product",
    "/help/shipping",
    "/checkout",
];

/// How every value begins, with its version after it.
const BEGIN: &str = "{\"version\":";

/// The value of a key as it was written the `version`-th time: at least `size` bytes, and at most 200 more than that
/// (or some 700, if `size` is less).
pub fn session(seed: u64, key: u64, version: u64, size: usize) -> Vec<u8> {
    let mut random = Random::new(mix(mix(seed, key), version));
    let mut text = String::with_capacity(size.max(600) + 200);
    let day = random.below(1_000);
    let mut put = |arguments: std::fmt::Arguments<'_>| {
        // Writing to a string cannot fail.
        let _ = text.write_fmt(arguments);
        text.len()
    };
    let (name, family) = (NAMES[random.below(NAMES.len())], FAMILIES[random.below(FAMILIES.len())]);
    put(format_args!("{BEGIN}{version},\"id\":{key},\"user\":{{\"id\":{},", random.below(5_000_000)));
    put(format_args!("\"name\":\"{name} {family}\",\"email\":\""));
    put(format_args!("{}.{}{}", name.to_lowercase(), family.to_lowercase(), random.below(1000)));
    put(format_args!("@example.org\",\"locale\":\"{}\"}},", ["en_GB", "de_DE", "fr_FR"][random.below(3)]));
    put(format_args!("\"token\":\"{:016x}{:016x}\",", random.draw(), random.draw()));
    put(format_args!("\"csrf\":\"{:016x}{:016x}\",", random.draw(), random.draw()));
    let address = [random.below(224), random.below(256), random.below(256), random.below(256)];
    put(format_args!("\"address\":\"{}.{}.{}.{}\",", address[0], address[1], address[2], address[3]));
    put(format_args!("\"agent\":\"{}\",", AGENTS[random.below(AGENTS.len())]));
    let mut seconds = 1_700_000_000 + day as u64 * 86_400 + random.below(80_000) as u64;
    put(format_args!("\"created_at\":{seconds},\"roles\":[\"customer\"],\"cart\":{},", random.below(4)));
    let mut length = put(format_args!("\"visits\":["));
    let mut first = true;
    while length + 2 < size || first {
        seconds += random.below(300) as u64;
        let comma = if std::mem::take(&mut first) { "" } else { "," };
        let path = PATHS[random.below(PATHS.len())];
        put(format_args!("{comma}{{\"at\":{seconds},\"path\":\"{path}\",\"item\":{},", random.below(90_000)));
        length = put(format_args!(
            "\"price\":\"{}.{:02}\",\"ms\":{},\"trace\":\"{:08x}\"}}",
            random.below(200),
            random.below(100),
            random.below(900),
            random.draw() >> 32
        ));
    }
    put(format_args!("]}}"));
    text.into_bytes()
}

/// The version that a value says it is.
pub fn version(value: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(value).ok()?;
    text.strip_prefix(BEGIN)?.split(',').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_are_json_of_about_the_size_and_no_two_are_alike() {
        let mut texts = std::collections::BTreeSet::new();
        for key in 0..200 {
            for size in [1, 1024, 4096] {
                let value = session(7, key, 3, size);
                assert!(
                    value.len() >= size && value.len() <= size.max(700) + 200,
                    "{} for {size}",
                    value.len()
                );
                let json: serde_json::Value = serde_json::from_slice(&value).expect("JSON");
                assert_eq!(json["id"], key);
                assert_eq!(version(&value), Some(3));
                assert_eq!(value, session(7, key, 3, size), "the same again");
                texts.insert(json["token"].to_string() + &size.to_string());
            }
        }
        assert_eq!(texts.len(), 600);
    }

    #[test]
    fn what_is_no_session_has_no_version() {
        for value in [&b""[..], b"{\"version\":", b"{\"version\":x,", &[0xff; 9]] {
            assert_eq!(version(value), None);
        }
    }
}
