//! A router with a stateful firewall and NAT, and connections through it.

use crate::common::{DEADLINE, LEFT, Net, RIGHT, eventually};
use serde_json::Value;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use towpath_lab::Node;

/// The router's address on the right, by which the left is seen there.
pub const OUTSIDE: &str = "198.51.100.1";
/// Of this port the router makes port 80 of the left host.
pub const FORWARDED: u16 = 8080;

/// What a firewall with masquerade and a port forwarding has. Only the left may begin connections, and whoever uses the
/// port forwarding.
const RULES: &str = "\
    table inet filter { \
        set stopped { type inet_service; }; \
        chain forward { \
            type filter hook forward priority 0; policy drop; \
            ct state invalid drop; \
            ct state established,related accept; \
            th dport @stopped drop; \
            iifname eth0 accept; \
            ct status dnat accept; \
        }; \
    }; \
    table ip nat { \
        chain out { type nat hook postrouting priority srcnat; oifname eth1 masquerade; }; \
        chain in { type nat hook prerouting priority dstnat; iifname eth1 tcp dport 8080 dnat to 192.0.2.2:80; }; \
    };";

/// Everything as in `Net`, with the firewall.
pub fn firewall() -> Net {
    let net = Net::new();
    net.router.run(["nft", RULES]).expect("rules");
    // So that nothing is new in the middle of a connection.
    net.router.sysctl("net.netfilter.nf_conntrack_tcp_loose", "0").expect("set");
    net
}

/// Sends back whatever comes, at every connection to this address in a node.
pub fn echo(node: &Node, address: &str) {
    let listener = node.enter(|| TcpListener::bind(address)).expect("in the node").expect("bound");
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let (mut from, mut to) = (stream.try_clone().expect("a second descriptor"), stream);
                std::io::copy(&mut from, &mut to)
            });
        }
    });
}

/// A connection with an echo at its other end.
pub struct Talk {
    pub stream: TcpStream,
    said: u64,
}

impl Talk {
    pub fn start(node: &Node, to: &str) -> Self {
        let to: SocketAddr = to.parse().expect("an address");
        let connect = || TcpStream::connect_timeout(&to, DEADLINE);
        let stream = node.enter(connect).expect("in the node").expect("connected");
        stream.set_nodelay(true).expect("set");
        stream.set_read_timeout(Some(DEADLINE)).expect("set");
        Self { stream, said: 0 }
    }

    /// Our port, as we know it.
    pub fn port(&self) -> u16 {
        self.stream.local_addr().expect("an address").port()
    }

    /// Says something, and has it said back.
    pub fn exchange(&mut self, times: u64) {
        for _ in 0..times {
            self.said += 1;
            let word = self.said.to_be_bytes();
            self.stream.write_all(&word).expect("sent");
            let mut answer = [0; 8];
            self.stream.read_exact(&mut answer).expect("an answer");
            assert_eq!(answer, word);
        }
    }

    /// Talks until the fast path carries it, both ways.
    pub fn becomes_fast(&mut self, net: &Net) {
        let mut last = flow(net, self.port()).map_or([0; 2], |found| fast_packets(&found));
        // One that is unwatched has been accepted, and is Linux's all the same.
        eventually("the connection goes fast", || {
            self.exchange(1);
            let found = flow(net, self.port())?;
            let before = std::mem::replace(&mut last, fast_packets(&found));
            (is_fast(&found) && (0..2).all(|way| last[way] > before[way])).then_some(())
        });
        let before = fast_packets(&flow(net, self.port()).expect("it is known"));
        self.exchange(20);
        let after = fast_packets(&flow(net, self.port()).expect("it is known"));
        assert!((0..2).all(|way| after[way] >= before[way] + 20), "{before:?} {after:?}");
    }

    /// Sends so many bytes, and has them come back as they are.
    pub fn transfer(&mut self, bytes: usize) {
        let data: Vec<u8> = (0..bytes as u64).map(|n| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as u8).collect();
        let mut sending = self.stream.try_clone().expect("a second descriptor");
        let mut came = vec![0; bytes];
        std::thread::scope(|scope| {
            scope.spawn(|| sending.write_all(&data).expect("sent"));
            self.stream.read_exact(&mut came).expect("all of it");
        });
        assert!(data == came, "the bytes are the same");
    }
}

/// Datagrams of the left, one at a time, that the right sends back.
pub struct Asker(UdpSocket);

impl Asker {
    pub fn start(net: &Net, port: u16) -> Self {
        let server = net.right.enter(|| UdpSocket::bind((RIGHT, port))).expect("in the node").expect("bound");
        let client = net.left.enter(|| UdpSocket::bind((LEFT, 0))).expect("in the node").expect("bound");
        client.connect((RIGHT, port)).expect("connected");
        [&server, &client].iter().for_each(|socket| socket.set_read_timeout(Some(DEADLINE)).expect("set"));
        std::thread::spawn(move || {
            let mut packet = [0; 8];
            while let Ok((length, from)) = server.recv_from(&mut packet) {
                let _ = server.send_to(&packet[..length], from);
            }
        });
        Self(client)
    }

    /// The port that it asks from.
    pub fn port(&self) -> u16 {
        self.0.local_addr().expect("an address").port()
    }

    /// Asks so often; nothing may be lost.
    pub fn ask(&self, times: u32) {
        for number in 0..times {
            self.0.send(&number.to_be_bytes()).expect("sent");
            let mut answer = [0; 4];
            self.0.recv(&mut answer).expect("an answer");
            assert_eq!(answer, number.to_be_bytes());
        }
    }

    /// Asks until the fast path carries it, both ways.
    pub fn becomes_fast(&self, net: &Net) {
        eventually("the questions go fast", || {
            self.ask(1);
            is_fast(&flow(net, self.port())?).then_some(())
        });
    }
}

/// What `show flows` says of the connection that the left began, or was asked for, by this port.
pub fn flow(net: &Net, port: u16) -> Option<Value> {
    let flows = net.json(&["show", "flows"]);
    let all = flows["flows"].as_array().expect("flows");
    all.iter().find(|flow| flow["original"]["source_port"] == port).cloned()
}

/// Whether both directions go fast.
pub fn is_fast(flow: &Value) -> bool {
    ["original", "reply"].iter().all(|way| flow[way]["state"] == "fast")
}

/// Packets that went fast, by direction.
pub fn fast_packets(flow: &Value) -> [u64; 2] {
    ["original", "reply"].map(|way| flow[way]["packets"].as_u64().expect("a count"))
}

/// The lines of Linux's connection tracking about a port of the left.
pub fn tracked(net: &Net, port: u16) -> Vec<String> {
    let all = net.exec("conntrack -L");
    let word = format!("sport={port} ");
    all.lines().filter(|line| line.contains(&word)).map(str::to_owned).collect()
}

/// Packets from left to right, each of which comes back, and when the last one did.
pub struct Pulse {
    stop: Arc<AtomicBool>,
    last: Arc<Mutex<Option<Instant>>>,
    pub port: u16,
    threads: Vec<JoinHandle<()>>,
}

impl Pulse {
    pub fn start(net: &Net, port: u16) -> Self {
        Self::between(&net.left, &net.right, (RIGHT, port))
    }

    /// A packet each millisecond.
    pub fn between(from: &Node, at: &Node, to: (&str, u16)) -> Self {
        Self::paced(from, at, to, Duration::from_millis(1))
    }

    /// A packet after each such pause.
    pub fn paced(from: &Node, at: &Node, to: (&str, u16), pause: Duration) -> Self {
        let to: SocketAddr = (to.0.parse::<IpAddr>().expect("an address"), to.1).into();
        let any: SocketAddr = if to.is_ipv4() { ([0; 4], 0).into() } else { ([0u16; 8], 0).into() };
        let server = at.enter(|| UdpSocket::bind(to)).expect("in the node").expect("bound");
        let client = from.enter(|| UdpSocket::bind(any)).expect("in the node").expect("bound");
        client.connect(to).expect("connected");
        for socket in [&server, &client] {
            socket.set_read_timeout(Some(Duration::from_millis(50))).expect("set");
        }
        let port = client.local_addr().expect("an address").port();
        let (stop, last) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(None)));
        let going = |stop: &Arc<AtomicBool>| {
            let stop = stop.clone();
            move || !stop.load(Ordering::Relaxed)
        };
        let (serve, send, receive) = (going(&stop), going(&stop), going(&stop));
        let (sending, noted) = (client.try_clone().expect("a second descriptor"), last.clone());
        let threads = vec![
            std::thread::spawn(move || {
                let mut packet = [0; 64];
                while serve() {
                    if let Ok((length, from)) = server.recv_from(&mut packet) {
                        let _ = server.send_to(&packet[..length], from);
                    }
                }
            }),
            std::thread::spawn(move || {
                while send() {
                    let _ = sending.send(&[7; 32]);
                    std::thread::sleep(pause);
                }
            }),
            std::thread::spawn(move || {
                while receive() {
                    if client.recv(&mut [0; 64]).is_ok() {
                        *noted.lock().expect("the time") = Some(Instant::now());
                    }
                }
            }),
        ];
        Self { stop, last, port, threads }
    }

    /// When the last answer came.
    pub fn last(&self) -> Option<Instant> {
        *self.last.lock().expect("the time")
    }

    /// Waits until no answer has come for so long; gives how long after `begin` the last one came.
    pub fn ends(&self, begin: Instant, silence: Duration) -> Duration {
        eventually("no more answers", || (self.last()?.elapsed() > silence).then_some(()));
        self.last().expect("answers before").saturating_duration_since(begin)
    }

    /// Waits until answers come that were given after now.
    pub fn goes_on(&self) {
        let begin = Instant::now() + Duration::from_millis(20);
        eventually("answers come", || (self.last()? > begin).then_some(()));
    }

    /// Waits until the fast path carries it, both ways.
    pub fn becomes_fast(&self, net: &Net) {
        eventually("the stream goes fast", || is_fast(&flow(net, self.port)?).then_some(()));
        let packets = || fast_packets(&flow(net, self.port).expect("it is known"));
        let before = packets();
        eventually("packets go fast", || {
            let after = packets();
            (0..2).all(|way| after[way] >= before[way] + 20).then_some(())
        });
    }
}

impl Drop for Pulse {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
    }
}

/// The left host's echo behind the port forwarding, and the right's own.
pub fn echoes(net: &Net) {
    echo(&net.right, &format!("{RIGHT}:7001"));
    echo(&net.left, &format!("{LEFT}:80"));
}
