//! Tables for people.

use super::units::{Bytes, Rate, micros};
use pageferry::MigrationReport;
use pageferry::report::{Codings, TimedPart};
use std::fmt::Write;

/// Columns that line up: as wide as their widest cell, `right` ones to the right.
pub(super) fn table(header: &[&str], right: &[usize], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let rows: Vec<Vec<String>> =
        std::iter::once(header.iter().map(|cell| (*cell).to_owned()).collect()).chain(rows).collect();
    let widths: Vec<usize> = (0..header.len())
        .map(|column| {
            rows.iter().filter_map(|row| row.get(column)).map(|cell| width(cell)).max().unwrap_or(0)
        })
        .collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate() {
            let pad = " ".repeat(widths[column].saturating_sub(width(cell)));
            let _ = match right.contains(&column) {
                true => write!(line, "{pad}{cell}  "),
                false => write!(line, "{cell}{pad}  "),
            };
        }
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text
}

/// A text of the peer without what a terminal would obey: control characters become a mark, but for line ends.
pub(super) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' { '\u{fffd}' } else { c }).collect()
}

/// Characters of the widest line of a cell.
fn width(cell: &str) -> usize {
    cell.lines().map(|line| line.chars().count()).max().unwrap_or(0)
}

/// The report of a migration that succeeded.
pub(super) fn report(report: &MigrationReport) -> String {
    let mut text = String::new();
    let processes = if report.processes == 1 { "process" } else { "processes" };
    let _ = writeln!(
        text,
        "{} ({} {processes}, {}) {} {} in {}\n",
        report.program,
        report.processes,
        Bytes(report.memory_bytes),
        if report.strategy == "checkpoint" { "is kept in" } else { "moved to" },
        report.to,
        micros(report.total_us)
    );
    let rows = report.rounds.iter().map(|round| {
        let rate = |pages: f64| match round.frozen || pages == 0.0 {
            true => "-".to_owned(),
            false => format!("{pages:.0}/s"),
        };
        vec![
            if round.frozen { "frozen".to_owned() } else { round.round.to_string() },
            round.dirty_pages.to_string(),
            round.sent_pages.to_string(),
            round.unchanged_pages.to_string(),
            round.zero_pages.to_string(),
            Bytes(round.sent_bytes).to_string(),
            micros(round.duration_us).to_string(),
            rate(round.dirty_rate),
            if round.frozen { "-".to_owned() } else { Rate(round.link_rate as u64).to_string() },
        ]
    });
    text += &table(
        &["round", "dirty", "sent", "unchanged", "zero", "bytes", "time", "dirty rate", "link"],
        &[1, 2, 3, 4, 5, 6, 7, 8],
        rows,
    );
    let mut codings = Codings::default();
    report.rounds.iter().for_each(|round| codings.add(&round.codings));
    let rows = codings.shares().into_iter().filter(|(_, share)| share.pages > 0).map(|(name, share)| {
        let each = match share.bytes {
            0 => "-".to_owned(),
            bytes => format!("{:.0}", bytes as f64 / share.pages as f64),
        };
        vec![name.to_owned(), share.pages.to_string(), Bytes(share.bytes).to_string(), each]
    });
    text.push('\n');
    text += &table(&["coding", "pages", "bytes", "a page"], &[1, 2, 3], rows);
    let downtime = &report.downtime_us;
    let parts = downtime.parts().map(|(name, us)| vec![name.to_owned(), micros(us).to_string()]);
    let total = vec!["total".to_owned(), micros(downtime.total).to_string()];
    text.push('\n');
    text += &table(&["downtime", ""], &[1], parts.into_iter().chain([total]));
    text += &prepared(report);
    let _ = writeln!(
        text,
        "\nstopped pre-copy: {}   tracker: {}   hide: {}   CRIU {}",
        report.stop_reason, report.tracker, report.hide, report.criu
    );
    let _ = writeln!(
        text,
        "sent {} in all, {} of it CRIU's images; engine memory at most {}{}",
        Bytes(report.bytes_sent),
        Bytes(report.image_bytes),
        Bytes(report.engine_peak_rss_bytes),
        report
            .engine_memory_bytes
            .map_or_else(String::new, |most| format!(", of {} that are allowed", Bytes(most)))
    );
    if !report.strategy_because.is_empty() {
        let _ = writeln!(text, "chose {}: {}", report.strategy, report.strategy_because);
    }
    if let Some(goals) = goals(report) {
        let _ = writeln!(text, "{goals}");
    }
    if let Some(slowdown) = report.slowdown {
        let allowed = report.max_slowdown.map(|most| format!(", of {:.1} % that are allowed", most * 100.0));
        let _ = writeln!(
            text,
            "it lost {:.1} % of its running time while it was copied{}",
            slowdown * 100.0,
            allowed.unwrap_or_default()
        );
    }
    if report.interruptions > 0 {
        let times = match report.interruptions {
            1 => "once".to_owned(),
            times => format!("{times} times"),
        };
        let _ = writeln!(
            text,
            "the link was lost {times} before the freeze, and waited for {} altogether",
            micros(report.interrupted_us)
        );
    }
    if report.paused_us > 0 {
        let _ = writeln!(text, "it was paused by hand for {} before the freeze", micros(report.paused_us));
    }
    if report.throttle_share > 0.0 {
        let _ = writeln!(
            text,
            "it wrote faster than the link carries, and was slowed down: up to {:.0} % of the time, {} in all, it stood still before the freeze",
            report.throttle_share * 100.0,
            micros(report.throttled_us)
        );
    }
    if let Some(fill) = &report.fill {
        let _ = writeln!(
            text,
            "{} of {} pages were in place before it ran, the rest {} later; {} page faults, the longest {}",
            fill.prefilled_pages,
            fill.pages,
            micros(fill.duration_us),
            fill.faults,
            micros(fill.max_fault_us)
        );
    }
    if let Some(late) = &report.post_copy {
        let _ = writeln!(
            text,
            "{} pages were owed when it ran there: {} fetched, {} sent unasked, in {} and {}",
            late.owed_pages,
            late.demanded_pages,
            late.pushed_pages,
            micros(late.duration_us),
            Bytes(late.sent_bytes)
        );
        let faults = &late.faults;
        text.push('\n');
        text += &table(
            &["waits for owed pages", "median", "99 %", "longest"],
            &[0, 1, 2, 3],
            [vec![
                faults.count.to_string(),
                micros(faults.p50_us).to_string(),
                micros(faults.p99_us).to_string(),
                micros(faults.max_us).to_string(),
            ]],
        );
        if late.reconnections > 0 {
            let _ = writeln!(text, "the link was lost {} times and taken up again", late.reconnections);
        }
    }
    if report.verified {
        let _ =
            writeln!(text, "verified: {} pages compared before the commit, all equal", report.verified_pages);
    }
    if let Some(network) = &report.network {
        let _ = writeln!(
            text,
            "{} moved with it: announced in {}, let in again in {}, {} packets ({}) had waited and were delivered in {}; away for {}",
            network.addresses.join(", "),
            micros(network.announce_us),
            micros(network.release_us),
            network.held_packets,
            Bytes(network.held_bytes),
            micros(network.deliver_us),
            micros(network.away_us)
        );
    }
    text += &match (report.strategy.as_str(), report.tcp.as_str(), &report.network) {
        ("checkpoint", ..) => {
            "established TCP connections are not in it: clients have to connect again after a restore\n"
                .to_owned()
        }
        (_, "closed", _) => {
            "established TCP connections were closed: clients have to connect again, to the destination\n"
                .to_owned()
        }
        (_, "kept", Some(network)) => match network.connections {
            1 => "1 established TCP connection was kept\n".to_owned(),
            connections => format!("{connections} established TCP connections were kept\n"),
        },
        _ => String::new(),
    };
    text
}

/// What was taken out of the downtime.
fn prepared(report: &MigrationReport) -> String {
    let prepared = &report.prepared_us;
    if prepared.total == 0 {
        return String::new();
    }
    let cell = |us: Option<u64>| us.map_or("-".to_owned(), |us| micros(us).to_string());
    let rows = prepared
        .parts()
        .into_iter()
        .map(|(name, source, destination)| vec![name.to_owned(), cell(source), cell(destination)]);
    let sum = |parts: &[TimedPart]| micros(parts.iter().map(|part| part.us).sum()).to_string();
    let total = vec!["total".to_owned(), sum(&prepared.source), sum(&prepared.destination)];
    let header = ["before the freeze", "source", "destination"];
    format!("\n{}", table(&header, &[1, 2], rows.chain([total])))
}

/// Which goals were met.
fn goals(report: &MigrationReport) -> Option<String> {
    let goal = |name: &str, wanted: u64, got: u64, met: bool| {
        let met = if met { "met" } else { "missed" };
        format!("{name} {met} ({} of {})", micros(got), micros(wanted))
    };
    let downtime =
        goal("downtime", report.downtime_goal_us, report.downtime_us.total, report.downtime_goal_met?);
    let total = report.total_time_goal_us.zip(report.total_time_goal_met);
    let total = total.map(|(wanted, met)| goal(", total time", wanted, report.complete_us, met));
    Some(format!("goals: {downtime}{}", total.unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry::report::{
        Downtime, FaultReport, FillReport, PostCopyReport, Prepared, RoundReport, Share,
    };

    fn example() -> MigrationReport {
        let mut downtime = Downtime {
            freeze: 1612,
            collect: 359,
            last_pages: 41,
            seal: 66,
            dump: 14_068,
            images: 361,
            restore: 13_646,
            confirm: 12,
            commit: 607,
            ..Downtime::default()
        };
        downtime.add_up();
        let parts = |parts: &[(&str, u64)]| {
            parts.iter().map(|(name, us)| TimedPart { name: (*name).to_owned(), us: *us }).collect()
        };
        let mut prepared = Prepared {
            source: parts(&[("connections", 1204), ("criu", 6310), ("counters", 2105), ("areas", 160)]),
            destination: parts(&[("criu", 31_400), ("memory", 112_300)]),
            ..Prepared::default()
        };
        prepared.add_up();
        MigrationReport {
            program: "redis-server".into(),
            processes: 1,
            to: "10.77.0.2:7077".into(),
            tracker: "userfaultfd".into(),
            hide: "shim".into(),
            criu: "4.2.1".into(),
            tcp: "closed".into(),
            memory_bytes: 67_317_760,
            bytes_sent: 68_538_383,
            image_bytes: 120_714,
            total_us: 281_177,
            stop_reason: "target-met".into(),
            verified: true,
            verified_pages: 17_183,
            downtime_us: downtime,
            prepared_us: prepared,
            engine_peak_rss_bytes: 4_984_832,
            rounds: vec![
                RoundReport {
                    dirty_pages: 16_435,
                    sent_pages: 16_435,
                    sent_bytes: 67_599_375,
                    codings: Codings {
                        raw: Share { pages: 16_035, bytes: 65_954_111 },
                        zstd: Share { pages: 400, bytes: 1_645_264 },
                        ..Codings::default()
                    },
                    duration_us: 218_553,
                    link_rate: 3.166e8,
                    ..RoundReport::default()
                },
                RoundReport {
                    round: 1,
                    frozen: true,
                    dirty_pages: 10,
                    sent_pages: 9,
                    unchanged_pages: 1,
                    sent_bytes: 38_086,
                    duration_us: 467,
                    ..RoundReport::default()
                },
            ],
            fill: Some(FillReport {
                pages: 16_435,
                prefilled_pages: 539,
                faults: 78,
                max_fault_us: 32,
                duration_us: 28_659,
            }),
            ..MigrationReport::default()
        }
    }

    #[test]
    fn a_report_lines_up() {
        insta::assert_snapshot!(report(&example()));
    }

    #[test]
    fn what_came_late_is_told() {
        let faults = FaultReport { count: 412, p50_us: 88, p99_us: 610, max_us: 2210 };
        let post_copy = Some(PostCopyReport {
            owed_pages: 16_000,
            demanded_pages: 400,
            pushed_pages: 15_590,
            repeated_pages: 3,
            zero_pages: 12,
            sent_bytes: 65_900_000,
            held_up: None,
            duration_us: 210_000,
            reconnections: 1,
            faults,
        });
        insta::assert_snapshot!(report(&MigrationReport { post_copy, ..example() }));
    }

    #[test]
    fn what_moved_of_the_network_is_told() {
        let network = Some(pageferry::report::NetworkReport {
            addresses: vec!["10.0.0.9/24@eth0".into()],
            connections: 204,
            announce_us: 700,
            block_us: 900,
            release_us: 400,
            deliver_us: 250,
            held_packets: 31,
            held_bytes: 4200,
            lost_packets: 0,
            away_us: 35_000,
        });
        let kept = |network| report(&MigrationReport { network, tcp: "kept".into(), ..example() });
        insta::assert_snapshot!(kept(network.clone()));
        let one = network.map(|network| pageferry::report::NetworkReport { connections: 1, ..network });
        assert!(kept(one).ends_with("\n1 established TCP connection was kept\n"));
    }

    #[test]
    fn a_checkpoint_is_said_to_be_one() {
        let (strategy, to) = ("checkpoint".to_owned(), "file:/srv/redis.pageferry".to_owned());
        let paused = report(&MigrationReport { paused_us: 2_500_000, ..example() });
        assert!(paused.contains("paused by hand for 2.50 s"), "{paused}");
        let text = report(&MigrationReport { strategy, to, fill: None, verified: false, ..example() });
        assert!(
            text.starts_with("redis-server (1 process, 64.2 MiB) is kept in file:/srv/redis.pageferry in")
        );
        assert!(!text.contains("verified") && text.contains("connections are not in it"), "{text}");
    }

    #[test]
    fn the_parts_of_the_downtime_sum_to_it() {
        let downtime = example().downtime_us;
        assert_eq!(downtime.total, downtime.parts().iter().map(|(_, us)| us).sum::<u64>());
        assert_eq!(downtime.total, 30_772);
    }
}
