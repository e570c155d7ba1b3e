//!     router 192.0.2.1 eth0 ---- up0 192.0.2.2 host
//!            10.0.1.1 gre1 (in the VRF red), where the kernel has GRE and VRFs

use crate::{Entry, Error, Fptun, Kind, NAME, Outcome, Packet, remove};
use std::io;
use std::net::{IpAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::Duration;
use towpath_lab::packet::udp;
use towpath_lab::{Lab, Node, supported};
use towpath_wire::fptun::Record;
use zerocopy::IntoBytes;

const DEADLINE: Duration = Duration::from_secs(20);
const ROUTER: &str = "192.0.2.1";
const HOST: &str = "192.0.2.2";
const MARK: u32 = 0x1234_5678;
/// Where receivers listen.
const PORT: u16 = 7;
/// Since Linux 5.19
const SO_RCVMARK: i32 = 75;

struct Net {
    router: Node,
    host: Node,
    _lab: Lab,
}

impl Net {
    fn new() -> Self {
        let lab = Lab::new("fptun").unwrap();
        let (router, host) = (lab.node("router").unwrap(), lab.node("host").unwrap());
        lab.link((&router, "eth0"), (&host, "up0")).unwrap();
        router.sh(&format!("ip address add {ROUTER}/24 dev eth0")).unwrap();
        host.sh(&format!("ip address add {HOST}/24 dev up0")).unwrap();
        Self { router, host, _lab: lab }
    }

    fn open(&self) -> Fptun {
        self.router.enter(Fptun::open).unwrap().unwrap()
    }

    fn has_device(&self) -> bool {
        self.router.run(["ip", "link", "show", "dev", NAME]).is_ok()
    }

    fn receiver(&self, device: Option<&str>) -> Receiver {
        self.router.enter(|| Receiver::new(device)).unwrap().unwrap()
    }

    /// From the host to the router.
    fn frame(&self, payload: &[u8]) -> Vec<u8> {
        let macs = (self.host.mac("up0").unwrap(), self.router.mac("eth0").unwrap());
        frame(macs, (HOST, ROUTER), payload)
    }
}

fn frame(macs: ([u8; 6], [u8; 6]), (from, to): (&str, &str), payload: &[u8]) -> Vec<u8> {
    let address = |text: &str| text.parse::<IpAddr>().unwrap();
    udp(macs, (address(from), address(to)), (1, PORT), payload)
}

fn ingress(device: u32, frame: &[u8]) -> Packet<'_> {
    Packet { entry: Entry::Ingress(device), mark: MARK, frame }
}

/// Outcomes of which each has this number, and all others 0.
fn counted(numbers: &[(Outcome, u64)]) -> [u64; Outcome::ALL.len()] {
    Outcome::ALL.map(|outcome| numbers.iter().filter(|(of, _)| *of == outcome).map(|(_, number)| number).sum())
}

/// What a socket received: payload, mark, and the interface by which it came.
#[derive(PartialEq, Eq, Debug)]
struct Received(Vec<u8>, u32, i32);

struct Receiver(UdpSocket);

impl Receiver {
    fn new(device: Option<&str>) -> io::Result<Self> {
        // SAFETY: takes numbers only.
        let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
        assert!(fd >= 0);
        // SAFETY: the call has just made this descriptor, and nothing else owns it.
        let socket = Self(unsafe { std::os::fd::FromRawFd::from_raw_fd(fd) });
        if let Some(device) = device {
            socket.set(libc::SOL_SOCKET, libc::SO_BINDTODEVICE, device.as_bytes())?;
        }
        socket.set(libc::SOL_SOCKET, SO_RCVMARK, 1i32.as_bytes())?;
        socket.set(libc::IPPROTO_IP, libc::IP_PKTINFO, 1i32.as_bytes())?;
        // SAFETY: plain numbers, for which zeroes are valid.
        let mut address: libc::sockaddr_in = unsafe { std::mem::zeroed() };
        (address.sin_family, address.sin_port) = (libc::AF_INET as u16, PORT.to_be());
        // SAFETY: the address lives through the call, and its size is given.
        let bound = unsafe { libc::bind(fd, (&raw const address).cast(), size_of_val(&address) as u32) };
        assert_eq!(bound, 0, "{}", io::Error::last_os_error());
        socket.0.set_read_timeout(Some(DEADLINE))?;
        Ok(socket)
    }

    fn set(&self, level: i32, option: i32, value: &[u8]) -> io::Result<()> {
        // SAFETY: the value lives through the call, and its length is given.
        let done =
            unsafe { libc::setsockopt(self.0.as_raw_fd(), level, option, value.as_ptr().cast(), value.len() as u32) };
        if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    fn receive(&self) -> Received {
        let (mut payload, mut control) = ([0u8; 2048], [0u64; 16]);
        let mut piece = libc::iovec { iov_base: payload.as_mut_ptr().cast(), iov_len: payload.len() };
        // SAFETY: plain numbers and pointers, for which zeroes are valid.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        (message.msg_iov, message.msg_iovlen) = (&raw mut piece, 1);
        (message.msg_control, message.msg_controllen) = (control.as_mut_ptr().cast(), size_of_val(&control));
        // SAFETY: header, vector and buffers live through the call, with the lengths given.
        let length = unsafe { libc::recvmsg(self.0.as_raw_fd(), &raw mut message, 0) };
        assert!(length >= 0, "nothing received: {}", io::Error::last_os_error());
        let (mut mark, mut device) = (0, 0);
        // SAFETY: the kernel has filled the control buffer; CMSG_* stay within it, and a message of each type holds what
        // is read.
        unsafe {
            let mut header = libc::CMSG_FIRSTHDR(&message);
            while let Some(control) = header.as_ref() {
                let data = libc::CMSG_DATA(header);
                match (control.cmsg_level, control.cmsg_type) {
                    (libc::SOL_SOCKET, libc::SO_MARK) => mark = data.cast::<u32>().read_unaligned(),
                    (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                        device = data.cast::<libc::in_pktinfo>().read_unaligned().ipi_ifindex;
                    }
                    _ => {}
                }
                header = libc::CMSG_NXTHDR(&message, header);
            }
        }
        Received(payload[..length as usize].to_vec(), mark, device)
    }

    fn is_empty(&self) -> bool {
        // SAFETY: a buffer of no length.
        unsafe { libc::recv(self.0.as_raw_fd(), std::ptr::null_mut(), 0, libc::MSG_DONTWAIT) < 0 }
    }
}

#[test]
fn an_interface_receives_the_packet_without_its_record() {
    let net = Net::new();
    let (fptun, receiver) = (net.open(), net.receiver(None));
    let sees = net.router.packet_socket("eth0").unwrap();
    let (frame, device) = (net.frame(b"hello"), net.router.ifindex("eth0").unwrap());
    let mut sender = net.router.enter(|| fptun.sender(Kind::Arrived)).unwrap().unwrap();
    assert_eq!(sender.send([ingress(device, &frame)]), 0);
    assert_eq!(receiver.receive(), Received(b"hello".to_vec(), MARK, device as i32));
    let seen = sees.receive_matching(DEADLINE, |seen| seen.bytes[12..14] == [8, 0]).unwrap().unwrap();
    assert_eq!(seen.bytes, frame);
    assert_eq!(fptun.outcomes().unwrap(), counted(&[(Outcome::Ingress, 1)]));
}

#[test]
fn what_arrived_is_not_judged_by_its_headers() {
    let net = Net::new();
    let fptun = net.open();
    let sees = net.router.packet_socket("eth0").unwrap();
    let device = net.router.ifindex("eth0").unwrap();
    // IPv6 that says that it holds IPv6, of which there are nine bytes: with the record behind it, a whole header.
    let mut frame = net.frame(&[0; 21]);
    frame[12..14].copy_from_slice(&[0x86, 0xdd]);
    frame[14..22].copy_from_slice(&[0x60, 0, 0, 0, 0, 0, 41, 64]);
    frame[54..62].copy_from_slice(&[0x60, 0, 0, 0, 0, 0, 59, 64]);
    let send = |kind| net.router.enter(|| fptun.sender(kind)).unwrap().unwrap().send([ingress(device, &frame)]);
    assert_eq!(send(Kind::Arrived), 0);
    // Multicast is the host's own.
    let seen = sees.receive_matching(DEADLINE, |seen| seen.bytes[..6] == frame[..6]).unwrap().unwrap();
    assert_eq!(seen.bytes, frame);
    assert_eq!(send(Kind::Whole), 1);
    assert_eq!(fptun.outcomes().unwrap(), counted(&[(Outcome::Ingress, 1), (Outcome::Undeliverable, 1)]));
}

#[test]
fn packets_leave_by_an_interface_in_order_and_without_their_records() {
    let net = Net::new();
    let fptun = net.open();
    let sees = net.host.packet_socket("up0").unwrap();
    let entry = Entry::Egress(net.router.ifindex("eth0").unwrap());
    let macs = (net.router.mac("eth0").unwrap(), net.host.mac("up0").unwrap());
    // Of all lengths, up to what the interface sends; more than are sent at once.
    let frames: Vec<_> = (0..200).map(|n| frame(macs, (ROUTER, HOST), &vec![n; 7 * usize::from(n)])).collect();
    let packets = frames.iter().map(|frame| Packet { entry, mark: 0, frame });
    let mut sender = net.router.enter(|| fptun.sender(Kind::Whole)).unwrap().unwrap();
    assert_eq!(sender.send(packets), 0);
    for frame in &frames {
        let seen = sees.receive_matching(DEADLINE, |seen| seen.bytes[12..14] == [8, 0]).unwrap().unwrap();
        assert_eq!(seen.bytes, *frame);
    }
    assert_eq!(fptun.outcomes().unwrap(), counted(&[(Outcome::Egress, 200)]));
}

#[test]
fn a_tunnel_in_a_vrf_receives_and_sends() {
    let net = Net::new();
    let tunnel = format!(
        "ip link add red type vrf table 100; ip link set red up; ip tunnel add gre1 mode gre local {ROUTER} remote {HOST}; \
         ip link set gre1 master red up; ip address add 10.0.1.1/30 dev gre1; ip address add 10.0.1.1/30 dev eth0"
    );
    if !supported("GRE and VRFs", || net.router.sh(&tunnel).map(drop)) {
        return;
    }
    let fptun = net.open();
    let mut sender = net.router.enter(|| fptun.sender(Kind::Whole)).unwrap().unwrap();
    let (red, main) = (net.receiver(Some("red")), net.receiver(Some("eth0")));
    let index = |name| net.router.ifindex(name).unwrap();

    // Of its Ethernet header the tunnel takes nothing but the type.
    let from_tunnel = frame(([0; 6], [0; 6]), ("10.0.1.2", "10.0.1.1"), b"by the tunnel");
    assert_eq!(sender.send([ingress(index("gre1"), &from_tunnel)]), 0);
    assert_eq!(red.receive(), Received(b"by the tunnel".to_vec(), MARK, index("gre1") as i32));

    // By the VRF's own device, which has an address; to the same address as outside of the VRF.
    let from_vrf = frame(([2; 6], net.router.mac("red").unwrap()), ("10.0.1.2", "10.0.1.1"), b"by the VRF");
    assert_eq!(sender.send([ingress(index("red"), &from_vrf)]), 0);
    let Received(payload, mark, _) = red.receive();
    assert_eq!((payload, mark), (b"by the VRF".to_vec(), MARK));
    assert!(main.is_empty());

    let into = frame(([0; 6], [0; 6]), ("10.0.1.1", "10.0.1.2"), b"into the tunnel");
    let sees = net.host.packet_socket("up0").unwrap();
    assert_eq!(sender.send([Packet { entry: Entry::Egress(index("gre1")), mark: 0, frame: &into }]), 0);
    let gre = |bytes: &[u8]| bytes[12..14] == [8, 0] && bytes[23] == 47;
    let seen = sees.receive_matching(DEADLINE, |seen| gre(&seen.bytes)).unwrap().unwrap();
    assert_eq!(seen.bytes[34..], [&[0, 0, 8, 0], &into[14..]].concat());
    assert_eq!(fptun.outcomes().unwrap(), counted(&[(Outcome::Ingress, 2), (Outcome::Egress, 1)]));
}

#[test]
fn what_the_fast_path_did_not_send_is_dropped_and_counted() {
    let net = Net::new();
    let (old, receiver) = (net.open(), net.receiver(None));
    let (frame, device) = (net.frame(b"forged"), net.router.ifindex("eth0").unwrap());
    let old_key = old.key;
    std::mem::forget(old);
    let fptun = net.open();
    let mut sender = net.router.enter(|| fptun.sender(Kind::Arrived)).unwrap().unwrap();

    let good = Record::new(fptun.key, Entry::Ingress(device), MARK);
    let changed = |change: &dyn Fn(&mut Record)| {
        let mut record = good;
        change(&mut record);
        record.as_bytes().to_vec()
    };
    let bad: [(&str, &[u8], Outcome); 11] = [
        ("no record", &[], Outcome::NoRecord),
        ("cut at its end", &good.as_bytes()[..31], Outcome::NoRecord),
        ("something behind it", &[good.as_bytes(), &[0]].concat(), Outcome::NoRecord),
        ("cut at its beginning", &good.as_bytes()[1..], Outcome::Forged),
        ("its end alone", &good.as_bytes()[24..], Outcome::Forged),
        ("a guessed key", &changed(&|record| record.key = [0, 0].map(Into::into)), Outcome::Forged),
        ("a key of before", &changed(&|record| record.key = old_key.map(Into::into)), Outcome::Forged),
        ("half the key", &changed(&|record| record.key[1] = 0.into()), Outcome::Forged),
        ("another version", &changed(&|record| record.version = 2.into()), Outcome::Unknown),
        ("another flag", &changed(&|record| record.flags = 2.into()), Outcome::Unknown),
        ("no such interface", &changed(&|record| record.device = 999_999.into()), Outcome::Undeliverable),
    ];
    let mut expected = [0; Outcome::ALL.len()];
    for (what, behind, outcome) in bad {
        assert_eq!(sender.send_raw(&frame, behind), 1, "{what}");
        expected[outcome as usize] += 1;
        assert_eq!(fptun.outcomes().unwrap(), expected, "{what}");
    }
    // Too short for a record, and what Linux routes there.
    assert_eq!(sender.send_raw(&frame[..14], &[0; 17]), 1);
    net.router.sh(&format!("ip route add 198.51.100.0/24 dev {NAME}")).unwrap();
    net.router.enter(|| UdpSocket::bind("0.0.0.0:0")?.send_to(b"routed", "198.51.100.1:7")).unwrap().unwrap();
    expected[Outcome::NoRecord as usize] += 2;
    assert_eq!(fptun.outcomes().unwrap(), expected);

    let last = net.frame(b"true");
    assert_eq!(sender.send([ingress(device, &last)]), 0);
    assert_eq!(receiver.receive().0, b"true", "what was dropped has not arrived before");
    assert!(receiver.is_empty());
}

#[test]
fn the_device_goes_with_its_owner() {
    let net = Net::new();
    let fptun = net.open();
    assert!(net.has_device());
    assert_eq!(net.router.run(["ip", "address", "show", "dev", NAME]).unwrap().matches("inet").count(), 0);
    // In whatever namespace the owner's thread is.
    drop(fptun);
    assert!(!net.has_device());
    net.router.enter(remove).unwrap().unwrap();
}

#[test]
#[ignore = "holds a device until it is killed; another test starts it"]
fn hold() {
    let _fptun = Fptun::open().unwrap();
    println!("held");
    loop {
        std::thread::park();
    }
}

#[test]
fn what_a_killed_process_left_goes() {
    let net = Net::new();
    let leave = || {
        let mut holder = net.router.command(std::env::current_exe().unwrap());
        holder.args(["--exact", "tests::hold", "--ignored", "--nocapture"]);
        let mut holder = net.router.start(holder).unwrap();
        holder.wait_for_output(DEADLINE, "held").unwrap();
        holder.kill().unwrap();
        assert!(net.has_device());
    };
    leave();
    net.router.enter(remove).unwrap().unwrap();
    assert!(!net.has_device());
    leave();
    let (fptun, receiver) = (net.open(), net.receiver(None));
    let mut sender = net.router.enter(|| fptun.sender(Kind::Arrived)).unwrap().unwrap();
    assert_eq!(sender.send([ingress(net.router.ifindex("eth0").unwrap(), &net.frame(b"after"))]), 0);
    assert_eq!(receiver.receive().0, b"after");
}

#[test]
fn another_interface_of_the_name_is_left_alone() {
    let net = Net::new();
    net.router.sh(&format!("ip link add {NAME} type veth peer name other")).unwrap();
    assert!(matches!(net.router.enter(Fptun::open).unwrap(), Err(Error::Taken)));
    net.router.enter(remove).unwrap().unwrap();
    assert!(net.has_device());
}
