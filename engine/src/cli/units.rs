//! Quantities as people write them, in and out.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// A number of bytes: `64MiB`, `8GiB`, `1.5GB`, `4096`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bytes(pub(super) u64);

/// Bytes a second: `100MB`, `1GiB`, or bits as links are sold: `1Gbit`, `100Mbit`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rate(pub(super) u64);

/// Per cent of one processor: `50%`, `150`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Percent(pub(super) u32);

/// A time: `150ms`, `1.5s`, `200us`, `2min`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Time(pub(super) Duration);

/// A share of a whole: `90%`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Share(pub(super) f64);

const BYTE_UNITS: [(&str, f64); 16] = [
    ("", 1.0),
    ("B", 1.0),
    ("kB", 1e3),
    ("KB", 1e3),
    ("MB", 1e6),
    ("GB", 1e9),
    ("TB", 1e12),
    ("KiB", 1024.0),
    ("MiB", 1_048_576.0),
    ("GiB", 1_073_741_824.0),
    ("TiB", 1_099_511_627_776.0),
    ("k", 1024.0),
    ("K", 1024.0),
    ("M", 1_048_576.0),
    ("G", 1_073_741_824.0),
    ("T", 1_099_511_627_776.0),
];

const BIT_UNITS: [(&str, f64); 4] =
    [("bit", 0.125), ("kbit", 125.0), ("Mbit", 125_000.0), ("Gbit", 125_000_000.0)];

const TIME_UNITS: [(&str, f64); 5] = [("us", 1e-6), ("µs", 1e-6), ("ms", 1e-3), ("s", 1.0), ("min", 60.0)];

/// Splits `text` into a number and one of `units`.
fn quantity(text: &str, units: &[(&str, f64)], example: &str) -> Result<f64, String> {
    let text = text.trim();
    let split = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let unit = unit.trim();
    let wrong = |what: &str| format!("{what} (write it like {example})");
    let value: f64 = number.parse().map_err(|_| wrong("a number is missing"))?;
    let factor = units
        .iter()
        .find(|(name, _)| *name == unit)
        .or_else(|| units.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit)))
        .map(|(_, factor)| *factor)
        .ok_or_else(|| match unit {
            "" => wrong("the unit is missing"),
            unit => wrong(&format!("the unit {unit:?} is not known")),
        })?;
    let value = value * factor;
    if value.is_finite() && value < 9e18 { Ok(value) } else { Err(wrong("the number is too large")) }
}

impl FromStr for Bytes {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        Ok(Self(quantity(text, &BYTE_UNITS, "64MiB or 8GiB")?.round() as u64))
    }
}

impl FromStr for Share {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match quantity(text, &[("%", 0.01)], "90%")? {
            share if share <= 1.0 => Ok(Self(share)),
            _ => Err("it is more than the whole (write it like 90%)".to_owned()),
        }
    }
}

impl FromStr for Rate {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim().trim_end_matches("/s").trim_end_matches("ps");
        let units: Vec<_> = BIT_UNITS.iter().chain(&BYTE_UNITS[1..11]).copied().collect();
        match quantity(text, &units, "1Gbit or 100MB")?.round() as u64 {
            0 => Err("a rate of zero sends nothing (write it like 1Gbit or 100MB)".to_owned()),
            rate => Ok(Self(rate)),
        }
    }
}

impl FromStr for Percent {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let number = text.trim();
        let number = number.strip_suffix('%').unwrap_or(number).trim_end();
        match number.parse::<u32>() {
            Ok(0) => Err("nothing of a processor does nothing (write it like 50%)".to_owned()),
            Ok(percent) => Ok(Self(percent)),
            Err(_) => Err("this is no percentage (write it like 50%)".to_owned()),
        }
    }
}

impl FromStr for Time {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let seconds = quantity(text, &TIME_UNITS, "150ms or 30s")?;
        Ok(Self(Duration::try_from_secs_f64(seconds).map_err(|_| "the time is too long".to_owned())?))
    }
}

fn scaled(value: f64, units: &[(&str, f64)]) -> String {
    let (unit, factor) = units
        .iter()
        .rev()
        // Rounding must not turn 999.96 into 1000.0.
        .find(|(_, factor)| value >= factor * 0.9995)
        .or(units.first())
        .copied()
        .unwrap_or(("", 1.0));
    let value = value / factor;
    match (factor == 1.0 && value.fract() == 0.0, value) {
        (true, value) => format!("{value:.0} {unit}"),
        (_, value) if value < 9.995 => format!("{value:.2} {unit}"),
        (_, value) if value < 99.95 => format!("{value:.1} {unit}"),
        (_, value) => format!("{value:.0} {unit}"),
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [
            ("B", 1.0),
            ("KiB", 1024.0),
            ("MiB", 1_048_576.0),
            ("GiB", 1_073_741_824.0),
            ("TiB", 1_099_511_627_776.0),
        ];
        f.pad(&scaled(self.0 as f64, &units))
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!(
            "{}/s",
            scaled(self.0 as f64, &[("B", 1.0), ("kB", 1e3), ("MB", 1e6), ("GB", 1e9), ("TB", 1e12)])
        ))
    }
}

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&scaled(self.0.as_secs_f64() * 1e6, &[("us", 1.0), ("ms", 1e3), ("s", 1e6)]))
    }
}

/// A time of so many microseconds.
pub(super) fn micros(us: u64) -> Time {
    Time(Duration::from_micros(us))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_people_write_is_understood() {
        let bytes = |text: &str| text.parse::<Bytes>().map(|b| b.0);
        assert_eq!(bytes("64MiB"), Ok(64 << 20));
        assert_eq!(bytes("1.5 GB"), Ok(1_500_000_000));
        assert_eq!(bytes("4096"), Ok(4096));
        assert_eq!(bytes("8g"), Ok(8 << 30));
        let rate = |text: &str| text.parse::<Rate>().map(|r| r.0);
        assert_eq!(rate("1Gbit"), Ok(125_000_000));
        assert_eq!(rate("100Mbit/s"), Ok(12_500_000));
        assert_eq!(rate("10MB"), Ok(10_000_000));
        let time = |text: &str| text.parse::<Time>().map(|t| t.0.as_micros());
        assert_eq!(time("150ms"), Ok(150_000));
        assert_eq!(time("1.5s"), Ok(1_500_000));
        assert_eq!(time("20us"), Ok(20));
    }

    #[test]
    fn mistakes_are_explained() {
        for (error, says) in [
            ("64 parsecs".parse::<Bytes>().unwrap_err(), "\"parsecs\" is not known"),
            ("MiB".parse::<Bytes>().unwrap_err(), "number is missing"),
            ("100".parse::<Time>().unwrap_err(), "unit is missing"),
            ("100".parse::<Rate>().unwrap_err(), "unit is missing"),
            ("0Gbit".parse::<Rate>().unwrap_err(), "sends nothing"),
            ("1e30GiB".parse::<Bytes>().unwrap_err(), "not known"),
            ("99999999999TiB".parse::<Bytes>().unwrap_err(), "too large"),
        ] {
            assert!(error.contains(says), "{error}");
        }
    }

    #[test]
    fn quantities_are_short() {
        assert_eq!(Bytes(67_595_251).to_string(), "64.5 MiB");
        assert_eq!(Bytes(512).to_string(), "512 B");
        assert_eq!(Rate(1_234_000_000).to_string(), "1.23 GB/s");
        assert_eq!(micros(30_760).to_string(), "30.8 ms");
        assert_eq!(micros(999_960).to_string(), "1.00 s");
    }

    proptest! {
        #[test]
        fn what_is_printed_can_be_read(bytes in 0u64..1 << 50, us in 1u64..3_600_000_000) {
            let back = Bytes(bytes).to_string().parse::<Bytes>().unwrap().0;
            prop_assert!((back as f64 - bytes as f64).abs() <= bytes as f64 * 0.006 + 1.0);
            let back = micros(us).to_string().parse::<Time>().unwrap().0.as_micros() as f64;
            prop_assert!((back - us as f64).abs() <= us as f64 * 0.006 + 1.0);
        }
    }
}
