//! Real servers, and transfers by real clients.
#![allow(dead_code, reason = "each test file uses a part")]

use crate::common::DEADLINE;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;
use towpath_lab::{Node, Process, wait_for};

/// What a gateway lets pass: whatever the left begins, or uses a port forwarding. Gateways with fail-over hear each other.
pub const FILTER: &str = "\
    table inet filter { \
        chain input { \
            type filter hook input priority 0; policy drop; \
            ct state established,related accept; \
            meta l4proto { icmp, ipv6-icmp, vrrp } accept; \
            iifname sync accept; \
        }; \
        chain forward { \
            type filter hook forward priority 0; policy drop; \
            ct state invalid drop; \
            ct state established,related accept; \
            iifname eth0 accept; \
            ct status dnat accept; \
        }; \
    };";

/// How long a server may take to start: a script's modules are many, and a virtual machine is slow.
const START: Duration = Duration::from_secs(90);
/// What is sent and fetched, in bytes.
const SIZE: usize = 16 << 20;

/// Starts a server in a node, and waits until it takes connections.
pub fn serve(node: &Node, at: &str, line: &str) -> Process {
    let at: SocketAddr = at.parse().expect("an address");
    let server = node.spawn(["sh", "-ec", line]).expect("started");
    let connect = || node.enter(|| TcpStream::connect_timeout(&at, DEADLINE).ok()).expect("in the node");
    wait_for(START, line, || connect().map(drop)).expect("in time");
    server
}

/// A folder of a node with a file of bytes that are like no others.
pub fn folder(node: &Node, name: &str) -> (PathBuf, Vec<u8>) {
    let path = node.folder(name);
    std::fs::create_dir(&path).expect("a folder");
    let mut data = vec![0; SIZE];
    File::open("/dev/urandom").and_then(|mut random| random.read_exact(&mut data)).expect("random bytes");
    std::fs::write(path.join("file"), &data).expect("written");
    (path, data)
}

/// A transfer by curl that goes slowly until it is told to hurry, so that much can happen meanwhile.
pub struct Transfer {
    hurry: Arc<AtomicBool>,
    copier: JoinHandle<Vec<u8>>,
}

impl Transfer {
    /// Fetches what the last of the words names.
    pub fn fetch(node: &Node, words: &[&str]) -> Self {
        Self::start(node, words, |client, hurry| {
            let mut fetched = Vec::new();
            copy_slowly(client.stdout.take().expect("output"), &mut fetched, hurry);
            fetched
        })
    }

    /// Sends these bytes to what the last of the words names.
    pub fn send(node: &Node, words: &[&str], data: &[u8]) -> Self {
        let data = data.to_vec();
        Self::start(node, &[&["-T", "-"], words].concat(), move |client, hurry| {
            copy_slowly(&data[..], client.stdin.take().expect("input"), hurry);
            data
        })
    }

    fn start(
        node: &Node,
        words: &[&str],
        copy: impl FnOnce(&mut Child, &AtomicBool) -> Vec<u8> + Send + 'static,
    ) -> Self {
        let mut command = node.command("curl");
        command.arg("-sS").args(words).stdin(Stdio::piped()).stdout(Stdio::piped());
        let (mut client, hurry) = (command.spawn().expect("started"), Arc::new(AtomicBool::new(false)));
        let hurries = hurry.clone();
        Self {
            hurry,
            copier: std::thread::spawn(move || {
                let data = copy(&mut client, &hurries);
                assert!(client.wait().expect("an end").success());
                data
            }),
        }
    }

    /// What was fetched, or sent.
    pub fn finish(self) -> Vec<u8> {
        self.hurry.store(true, Ordering::Relaxed);
        self.copier.join().expect("a transfer")
    }
}

fn copy_slowly(mut from: impl Read, mut to: impl Write, hurry: &AtomicBool) {
    let mut part = vec![0; 1 << 10];
    loop {
        match from.read(&mut part).expect("bytes") {
            0 => return,
            length => to.write_all(&part[..length]).expect("written"),
        }
        if !hurry.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
