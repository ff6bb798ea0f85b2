use super::*;
use crate::attach::SpaceKey;
use crate::observation::{ObjectId, Observation, ObservedObject, ObservedRegion, ObservedSpace, RegionKind};
use crate::page_set::{PageSet, Run};
use proptest::prelude::*;

pub(super) fn header() -> Header {
    Header {
        version: VERSION,
        started_unix_ms: 1_700_000_000_000,
        interval: Duration::from_millis(100),
        source: "userfaultfd".into(),
        scope: Scope::All,
        root_pid: 4711,
        root_name: "program".into(),
    }
}

pub(super) fn pages(runs: &[(u64, u64)]) -> PageSet {
    runs.iter().map(|(start, len)| Run { start: *start, len: *len }).collect()
}

fn record(observations: &[Observation]) -> Vec<u8> {
    let mut writer = Writer::new(Vec::new(), &header()).unwrap();
    observations.iter().for_each(|observation| writer.write(observation).unwrap());
    writer.finish().unwrap()
}

fn read(file: &[u8]) -> Result<(Vec<Observation>, Ending), ReadError> {
    let mut reader = Reader::new(file)?;
    assert_eq!(*reader.header(), header());
    let observations = reader.by_ref().collect::<Result<_, _>>()?;
    assert!(reader.next().is_none());
    Ok((observations, reader.ending()))
}

fn region(start: u64, end: u64, kind: RegionKind, name: &str) -> ObservedRegion {
    ObservedRegion { start, end, kind, name: name.into() }
}

/// A process that grows, forks, loses a mapping, and is looked into.
fn story() -> Vec<Observation> {
    let heap = region(0x100, 0x200, RegionKind::Heap, "[heap]");
    let data = region(0x1000, 0x9000, RegionKind::Anonymous, "");
    let stack = region(0x7fff_f000, 0x7fff_ff00, RegionKind::Stack, "[stack]");
    let vsyscall = region(0xf_ffff_ffff_f600, 0xf_ffff_ffff_f601, RegionKind::Other, "[vsyscall]");
    let first = ObservedSpace {
        key: SpaceKey(0),
        pid: 4711,
        name: "program".into(),
        is_new: true,
        regions: vec![heap.clone(), stack.clone(), vsyscall.clone()],
        populated: pages(&[(0x100, 0x80), (0x7fff_fe00, 0x100)]),
        dirty: pages(&[(0x100, 0x80), (0x7fff_fe00, 0x100)]),
        unchanged: None,
    };
    let grown = ObservedSpace {
        is_new: false,
        regions: vec![heap, data.clone(), stack, vsyscall],
        populated: pages(&[(0x100, 0x90), (0x1000, 0x4000), (0x7fff_fe00, 0x100)]),
        dirty: pages(&[(0x170, 0x20), (0x1000, 0x4000)]),
        unchanged: Some(pages(&[(0x170, 4)])),
        ..first.clone()
    };
    let child =
        ObservedSpace { key: SpaceKey(1), pid: 4712, name: "child é".into(), is_new: true, ..grown.clone() };
    let shrunk = ObservedSpace {
        populated: pages(&[(0x100, 0x90)]),
        dirty: PageSet::default(),
        regions: vec![data],
        unchanged: Some(PageSet::default()),
        ..grown.clone()
    };
    let at = |ms: u64, spaces, objects, exited| Observation {
        at: Duration::from_millis(ms),
        took: Duration::from_micros(731),
        pause: Duration::from_micros(17),
        spaces,
        objects,
        exited,
    };
    let shared = ObservedObject {
        id: ObjectId { device: (0, 26), inode: 1031 },
        name: "/dev/shm/é".into(),
        is_new: true,
        mapped_by: vec![SpaceKey(0)],
        populated: pages(&[(0, 40), (100, 1)]),
        dirty: pages(&[(0, 40), (100, 1)]),
        unchanged: None,
    };
    let written = ObservedObject {
        is_new: false,
        mapped_by: vec![SpaceKey(0), SpaceKey(1)],
        populated: pages(&[(0, 50)]),
        dirty: pages(&[(7, 2), (40, 10)]),
        unchanged: Some(pages(&[(8, 1)])),
        ..shared.clone()
    };
    let other =
        ObservedObject { id: ObjectId { device: (0, 1), inode: 0 }, name: String::new(), ..shared.clone() };
    vec![
        at(1, vec![first], vec![shared.clone()], vec![]),
        at(101, vec![grown.clone(), child], vec![other, written], vec![]),
        at(203, vec![ObservedSpace { pid: 5000, ..grown }], vec![], vec![SpaceKey(1)]),
        at(300, vec![shrunk], vec![shared], vec![]),
        at(400, vec![], vec![], vec![SpaceKey(0)]),
    ]
}

#[test]
fn a_recording_comes_back() {
    let (observations, ending) = read(&record(&story())).unwrap();
    assert_eq!(observations, story());
    assert_eq!(ending, Ending::Finished);
}

/// The bytes of docs/RECORDING.md's example: whoever reads recordings of this version relies on them.
#[test]
fn the_bytes_of_version_2_stay_what_they_are() {
    let space = ObservedSpace {
        key: SpaceKey(3),
        pid: 4711,
        name: "redis".into(),
        is_new: true,
        regions: vec![region(0x100, 0x180, RegionKind::Heap, "[heap]")],
        populated: pages(&[(0x100, 2), (0x110, 1)]),
        dirty: pages(&[(0x101, 1)]),
        unchanged: Some(PageSet::default()),
    };
    let observation = Observation {
        at: Duration::from_nanos(300),
        took: Duration::from_nanos(2),
        pause: Duration::ZERO,
        spaces: vec![space],
        objects: vec![ObservedObject {
            id: ObjectId { device: (0, 26), inode: 5 },
            name: "/dev/shm/x".into(),
            is_new: true,
            mapped_by: vec![SpaceKey(3)],
            populated: pages(&[(0, 4)]),
            dirty: pages(&[(2, 1)]),
            unchanged: None,
        }],
        exited: vec![SpaceKey(2)],
    };
    let file = record(&[observation]);
    let hex: Vec<String> = file.iter().map(|byte| format!("{byte:02x}")).collect();
    let lines: Vec<String> = hex.chunks(16).map(|line| line.join(" ")).collect();
    assert_eq!(lines, EXAMPLE, "\n{}", lines.join("\n"));
    let document = include_str!("../../../docs/RECORDING.md");
    for line in EXAMPLE {
        assert!(document.contains(line), "docs/RECORDING.md lacks {line:?}");
    }
}

const EXAMPLE: &[&str] = &[
    "50 46 52 45 43 4f 52 44 02 00 00 00 00 00 00 00",
    "21 00 00 00 21 00 00 00 3b 75 79 fe 7a 54 26 62",
    "73 31 ae 26 80 d0 95 ff bc 31 80 c2 d7 2f ce 49",
    "0b 75 73 65 72 66 61 75 6c 74 66 64 07 70 72 6f",
    "67 72 61 6d 01 01 00 00 00 49 00 00 00 49 00 00",
    "00 a7 99 6e 90 a5 85 aa ec 6b 24 02 84 ac 02 02",
    "00 01 02 01 03 2f ce 49 05 72 65 64 69 73 00 00",
    "01 80 04 80 02 00 06 5b 68 65 61 70 5d 01 02 80",
    "02 0e 01 00 00 01 01 81 02 00 00 01 00 1a 05 0f",
    "0a 2f 64 65 76 2f 73 68 6d 2f 78 01 03 01 01 00",
    "03 00 01 01 02 00 02 00 00 00 01 00 00 00 01 00",
    "00 00 09 43 44 5d 35 77 8d 63 e0 3b ba 64 01",
];

/// What version 1 wrote is read for ever.
#[test]
fn version_1_is_read() {
    let bytes = VERSION_1.iter().flat_map(|line| line.split(' '));
    let file: Vec<u8> = bytes.map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
    let mut reader = Reader::new(&file[..]).unwrap();
    assert_eq!(*reader.header(), Header { version: 1, scope: Scope::Lazy, ..header() });
    let observation = reader.next().unwrap().unwrap();
    assert!(reader.next().is_none());
    assert_eq!(reader.ending(), Ending::Finished);
    assert!(observation.objects.is_empty());
    assert_eq!((observation.at, observation.exited), (Duration::from_nanos(300), vec![SpaceKey(2)]));
    let [space] = &observation.spaces[..] else { panic!("{:?}", observation.spaces) };
    assert_eq!((space.pid, space.name.as_str(), space.is_new), (4711, "redis", true));
    assert_eq!(space.regions, [region(0x100, 0x180, RegionKind::Heap, "[heap]")]);
    assert_eq!((&space.populated, &space.dirty), (&pages(&[(0x100, 2), (0x110, 1)]), &pages(&[(0x101, 1)])));
    assert_eq!(space.unchanged, Some(PageSet::default()));
}

const VERSION_1: &[&str] = &[
    "50 46 52 45 43 4f 52 44 01 00 00 00 00 00 00 00",
    "20 00 00 00 20 00 00 00 01 76 ee 5f 1d 4f ec 95",
    "02 44 5f 15 80 d0 95 ff bc 31 80 c2 d7 2f ce 49",
    "0b 75 73 65 72 66 61 75 6c 74 66 64 07 70 72 6f",
    "67 72 61 6d 01 00 00 00 2e 00 00 00 2e 00 00 00",
    "c6 00 60 21 cd e3 7b ac df d3 ca 90 ac 02 02 00",
    "01 02 01 03 2f ce 49 05 72 65 64 69 73 00 00 01",
    "80 04 80 02 00 06 5b 68 65 61 70 5d 01 02 80 02",
    "0e 01 00 00 01 01 81 02 00 00 02 00 00 00 01 00",
    "00 00 01 00 00 00 09 43 44 5d 35 77 8d 63 e0 3b",
    "ba 64 01",
];

#[test]
fn an_interrupted_recording_is_read_up_to_its_last_whole_frame() {
    let file = record(&story());
    let mut seen = std::collections::BTreeSet::new();
    for len in 0..file.len() {
        match read(&file[..len]) {
            Ok((observations, ending)) => {
                assert_eq!(observations, story()[..observations.len()], "{len} bytes");
                let whole_frames = observations.len() as u64;
                assert_eq!(ending, Ending::Interrupted { whole_frames }, "{len} bytes");
                seen.insert(whole_frames);
            }
            Err(ReadError::NoHeader) => assert!(seen.is_empty(), "{len} bytes"),
            Err(error) => panic!("{len} bytes: {error}"),
        }
    }
    assert_eq!(seen.len(), story().len() + 1);
}

#[test]
fn a_flipped_bit_is_never_taken_for_data() {
    let file = record(&story());
    for at in 0..file.len() {
        for bit in 0..8 {
            let mut file = file.clone();
            file[at] ^= 1 << bit;
            let error = read(&file).expect_err("a flipped bit must show");
            match error {
                ReadError::NotARecording => assert!(at < 8),
                ReadError::Newer { version } => {
                    assert!((8..12).contains(&at));
                    assert!(error.to_string().contains(&format!("version {version}")));
                }
                ReadError::Damaged { offset, .. } => assert!(offset <= at as u64, "{at}: {error}"),
                other => panic!("byte {at}: {other}"),
            }
        }
    }
}

#[test]
fn frames_that_are_lost_or_doubled_or_follow_the_end_show() {
    let file = record(&story());
    let mut reader = Reader::new(&file[..]).unwrap();
    let mut offsets = vec![reader.offset as usize];
    while reader.next().is_some_and(|observation| observation.is_ok()) {
        offsets.push(reader.offset as usize);
    }
    let (second, third) = (offsets[1], offsets[2]);
    let lost = [&file[..second], &file[third..]].concat();
    let doubled = [&file[..third], &file[second..]].concat();
    let longer = [&file[..], &[0]].concat();
    for (file, frame) in [(lost, 2), (doubled, 3), (longer, 6)] {
        match read(&file) {
            Err(ReadError::Damaged { frame: found, .. }) => assert_eq!(found, frame),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn what_is_no_recording_is_refused_by_name() {
    assert!(matches!(read(b"{\"json\": 1}"), Err(ReadError::NotARecording)));
    let mut newer = record(&story());
    newer[8..12].copy_from_slice(&9u32.to_le_bytes());
    // The version is read before anything else: what follows may be anything.
    newer.truncate(12);
    let error = read(&newer).unwrap_err();
    assert!(matches!(error, ReadError::Newer { version: 9 }), "{error}");
    let other = Header { version: 9, ..header() };
    assert!(matches!(Writer::new(Vec::new(), &other), Err(WriteError::Version(9))));
}

#[test]
fn a_full_disk_is_an_error_and_leaves_what_was_written() {
    struct Disk<'a>(&'a mut Vec<u8>, usize);
    impl io::Write for Disk<'_> {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let room = self.1.saturating_sub(self.0.len()).min(bytes.len());
            if room == 0 && !bytes.is_empty() {
                return Err(io::Error::from(io::ErrorKind::StorageFull));
            }
            self.0.extend_from_slice(&bytes[..room]);
            Ok(room)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let size = record(&story()[..3]).len();
    let mut disk = Vec::new();
    let mut writer = Writer::new(Disk(&mut disk, size), &header()).unwrap();
    for observation in &story()[..3] {
        writer.write(observation).unwrap();
    }
    let error = writer.write(&story()[3]).unwrap_err();
    assert!(matches!(error, WriteError::Io { whole_frames: 3, .. }), "{error}");
    assert!(matches!(writer.write(&story()[4]), Err(WriteError::Broken)));
    assert!(matches!(writer.finish(), Err(WriteError::Broken)));
    let (observations, ending) = read(&disk).unwrap();
    assert_eq!(observations, story()[..3]);
    assert_eq!(ending, Ending::Interrupted { whole_frames: 3 });
}

/// A head with checksums that fit, whatever it says.
fn forged_head(kind: u8, coding: u8, stored: u32, len: u32, number: u64) -> Vec<u8> {
    use xxhash_rust::xxh3::xxh3_64_with_seed;
    let mut head = vec![kind, coding, 0, 0];
    head.extend(stored.to_le_bytes());
    head.extend(len.to_le_bytes());
    let sum = xxh3_64_with_seed(&head, number) as u32;
    head.extend(sum.to_le_bytes());
    head
}

#[test]
fn lengths_that_lie_reserve_no_memory() {
    use xxhash_rust::xxh3::xxh3_64_with_seed;
    let mut writer = Writer::new(Vec::new(), &header()).unwrap();
    writer.write(&story()[0]).unwrap();
    let start = writer.output;
    let with = |head: Vec<u8>, stored: &[u8]| {
        let mut file = start.clone();
        file.extend(head);
        file.extend(xxh3_64_with_seed(stored, 2).to_le_bytes());
        file.extend_from_slice(stored);
        read(&file)
    };
    // A frame of 256 MiB in a file of some bytes is one that was interrupted.
    let ended = with(forged_head(1, 0, 256 << 20, 256 << 20, 2), b"some bytes").unwrap();
    assert_eq!(ended.1, Ending::Interrupted { whole_frames: 1 });
    let refused = |result: Result<_, ReadError>| match result {
        Err(ReadError::Damaged { frame: 2, what, .. }) => what,
        other => panic!("{other:?}"),
    };
    // More than the format allows, more than compression can, and coded in a way that there is not.
    refused(with(forged_head(1, 0, u32::MAX, u32::MAX, 2), b""));
    refused(with(forged_head(1, 1, 100, 256 << 20, 2), &[0; 100]));
    refused(with(forged_head(1, 7, 4, 4, 2), b"1234"));
    refused(with(forged_head(9, 0, 4, 4, 2), b"1234"));
    // Compressed bytes that become more, or less, than was said.
    let zeros = zstd::bulk::compress(&[0; 3000], 3).unwrap();
    refused(with(forged_head(1, 1, zeros.len() as u32, 2999, 2), &zeros));
    refused(with(forged_head(1, 1, zeros.len() as u32, 3001, 2), &zeros));
    // A payload that promises 2^32 spaces, and one that has the same space twice.
    let spaces = b"\0\0\0\0\xff\xff\xff\xff\x0f";
    let what = refused(with(forged_head(1, 0, spaces.len() as u32, spaces.len() as u32, 2), spaces));
    assert_eq!(what, "it promises more items than it has room for");
    let twice = b"\0\0\0\0\x02\0\x10\0\x10";
    let what = refused(with(forged_head(1, 0, twice.len() as u32, twice.len() as u32, 2), twice));
    assert_eq!(what, "it has a space twice");
    let twice = b"\0\0\0\0\0\x02\0\x01\x07\x10\0\x01\x07\x10";
    let what = refused(with(forged_head(1, 0, twice.len() as u32, twice.len() as u32, 2), twice));
    assert_eq!(what, "it has an object twice");
}

proptest! {
    /// Whatever a payload says: an observation or an error, and no more memory than its bytes account for.
    #[test]
    fn any_payload_is_an_observation_or_an_error(payload in proptest::collection::vec(any::<u8>(), 0..200)) {
        let mut memory = content::Memory::default();
        let _ = memory.observation(&payload, VERSION);
    }

    #[test]
    fn a_damaged_payload_is_an_observation_or_an_error(at in any::<prop::sample::Index>(), to in any::<u8>()) {
        let (mut written, mut memory) = (content::Memory::default(), content::Memory::default());
        for observation in story() {
            let mut payload = Vec::new();
            written.put(&mut payload, &observation);
            let at = at.index(payload.len());
            payload[at] = to;
            let _ = memory.observation(&payload, VERSION);
        }
    }
}
