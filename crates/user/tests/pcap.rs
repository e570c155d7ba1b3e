//! Files as a wire.
#![cfg(not(miri))]

mod support;

use pcap_file::pcap::{PcapHeader, PcapPacket, PcapReader, PcapWriter};
use pcap_file::{DataLink, TsResolution};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use support::{arrived, buffers, give, transmit};
use towpath_user::pcap::PcapPort;
use towpath_user::{BATCH, Pool, PortDriver};

/// A folder that goes when the test is over.
struct Folder(PathBuf);

impl Folder {
    /// One at a time: a test sets a limit for this process.
    fn new(name: &str) -> (Self, MutexGuard<'static, ()>) {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let path = std::env::temp_dir().join(format!("towpath-pcap-{}-{name}", std::process::id()));
        std::fs::create_dir(&path).expect("a folder");
        (Self(path), alone)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn frame(number: usize) -> Vec<u8> {
    vec![number as u8; 60 + number]
}

fn write(path: &Path, datalink: DataLink, packets: &[(Vec<u8>, u32)]) {
    let header = PcapHeader { datalink, ts_resolution: TsResolution::MicroSecond, ..PcapHeader::default() };
    let mut writer = PcapWriter::with_header(File::create(path).expect("a file"), header).expect("a header");
    for (packet, orig_len) in packets {
        writer.write_packet(&PcapPacket::new(Duration::ZERO, *orig_len, packet)).expect("a packet");
    }
}

fn whole(frames: impl Iterator<Item = Vec<u8>>) -> Vec<(Vec<u8>, u32)> {
    frames.map(|frame| (frame.clone(), frame.len() as u32)).collect()
}

/// All that arrives until nothing more does, from batch to batch.
fn received(port: &mut PcapPort, pool: &mut Pool) -> Vec<Vec<Vec<u8>>> {
    std::iter::from_fn(|| Some(arrived(port, pool)).filter(|batch| !batch.is_empty())).collect()
}

#[test]
fn what_a_file_holds_arrives_whole_and_in_order_and_then_nothing() {
    let ((folder, _alone), mut pool) = (Folder::new("in"), Pool::new(2 * BATCH, 4096));
    let path = folder.file("in.pcap");
    let mut packets = whole((0..BATCH + 5).map(frame));
    // Cut when it was captured, and longer than frames are.
    packets.insert(3, (vec![9; 60], 61));
    packets.insert(5, (vec![9; 4000], 4000));
    write(&path, DataLink::ETHERNET, &packets);
    let mut port = PcapPort::open(Some(&path), None).expect("the file");
    assert!(!port.readable(&mut Vec::new()), "something may come that only asking shows");
    let expected: Vec<_> = (0..BATCH + 5).map(frame).collect();
    let batches = received(&mut port, &mut pool);
    assert_eq!(batches, [&expected[..BATCH], &expected[BATCH..]]);
    assert!(port.readable(&mut Vec::new()), "nothing will come");
    assert_eq!(pool.free(), pool.count());
}

#[test]
fn what_leaves_is_in_the_file_at_once_with_the_time_in_nanoseconds() {
    let ((folder, _alone), mut pool) = (Folder::new("out"), Pool::new(2 * BATCH, 4096));
    let path = folder.file("out.pcap");
    std::fs::write(&path, "something older").expect("a file");
    let mut port = PcapPort::open(None, Some(&path)).expect("a new file");
    let sent: Vec<_> = (0..10).map(frame).collect();
    let before = SystemTime::now().duration_since(UNIX_EPOCH).expect("time");
    for part in [&sent[..0], &sent[..4], &sent[4..]] {
        assert_eq!(transmit(&mut port, &mut pool, part), 0);
        assert_eq!(pool.free(), pool.count());
    }
    let after = SystemTime::now().duration_since(UNIX_EPOCH).expect("time");
    let mut reader = PcapReader::new(File::open(&path).expect("the file")).expect("a header");
    assert_eq!(
        (reader.header().datalink, reader.header().ts_resolution),
        (DataLink::ETHERNET, TsResolution::NanoSecond)
    );
    let mut found = Vec::new();
    while let Some(packet) = reader.next_packet() {
        let packet = packet.expect("a packet");
        assert!(before <= packet.timestamp && packet.timestamp <= after, "{:?}", packet.timestamp);
        assert_eq!(packet.orig_len as usize, packet.data.len());
        found.push(packet.data.to_vec());
    }
    assert_eq!(found, sent);
}

#[test]
fn a_file_that_cannot_be_written_refuses_what_leaves() {
    let mut pool = Pool::new(4, 4096);
    let mut port = PcapPort::open(None, Some(Path::new("/dev/full"))).err();
    let error = port.take().expect("there is no room for the header").to_string();
    assert!(error.contains("/dev/full") && error.contains("No space left"), "{error}");
    // The disk gets full later.
    let (folder, _alone) = Folder::new("full");
    let path = folder.file("out.pcap");
    let mut port = PcapPort::open(None, Some(&path)).expect("a file");
    let limit = libc::rlimit { rlim_cur: 100, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: plain values; the limit of this process for files is what it was when this is over.
    let (mut frames, left) = unsafe {
        let mut before = std::mem::zeroed();
        libc::getrlimit(libc::RLIMIT_FSIZE, &mut before);
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        libc::setrlimit(libc::RLIMIT_FSIZE, &limit);
        let mut frames = buffers(&mut pool, &[frame(1), frame(2)]);
        port.transmit(&mut pool, &mut frames);
        libc::setrlimit(libc::RLIMIT_FSIZE, &before);
        let left = frames.len();
        (frames, left)
    };
    assert_eq!(left, 2);
    port.transmit(&mut pool, &mut frames);
    assert_eq!(frames.len(), 2, "nor does anything follow");
    give(&mut pool, frames);
}

#[test]
fn files_of_other_kinds_are_refused_with_what_helps() {
    let (folder, _alone) = Folder::new("kinds");
    let refused = |path: &Path| PcapPort::open(Some(path), None).err().expect("no wire").to_string();
    let ng = folder.file("ng.pcapng");
    std::fs::write(&ng, [0x0a, 0x0d, 0x0d, 0x0a].repeat(10)).expect("a file");
    let raw = folder.file("raw.pcap");
    write(&raw, DataLink::RAW, &[]);
    let cases = [
        (folder.file("none"), "No such file"),
        (folder.0.clone(), "no regular file"),
        (ng, "editcap -F nsecpcap"),
        (raw, "RAW, not Ethernet"),
    ];
    for (path, words) in cases {
        let error = refused(&path);
        assert!(error.contains(words) && error.contains(&*path.to_string_lossy()), "{error}");
    }
}
