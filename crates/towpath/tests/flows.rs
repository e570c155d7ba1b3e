//! Connections through a stateful firewall and NAT: the first packets by Linux, the rest fast once Linux says so, and never
//! past what Linux would have let through.

mod common;
#[path = "flows/queue.rs"]
mod queue;
#[path = "flows/support.rs"]
mod support;

use common::{DEADLINE, Daemon, LEFT, Net, RIGHT, RIGHT6, eventually};
use queue::Queue;
use std::net::{Shutdown, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};
use support::{Asker, FORWARDED, OUTSIDE, Pulse, Talk, echo, echoes, fast_packets, firewall, flow, is_fast, tracked};
use towpath_lab::supported;
use towpath_tables::flow::LEASE;

/// More than this after a command is a leak, whatever else the machine does. What was seen is printed.
const LEAK: Duration = Duration::from_secs(1);

fn up(net: &Net) -> Daemon {
    net.up(&["--flows", "established", "eth0", "eth1"])
}

/// Sees that no answer came long after a command.
fn stops(pulse: &Pulse, begin: Instant) {
    let after = pulse.ends(begin, LEAK);
    println!("stopped after {after:?}");
    assert!(after < LEAK, "{after:?}");
}

#[test]
fn transfers_through_nat_are_whole_and_fast() {
    const BYTES: usize = 4 << 20;
    let net = firewall();
    let _daemon = up(&net);
    echoes(&net);
    for (from, to, source) in
        [(&net.left, format!("{RIGHT}:7001"), OUTSIDE), (&net.right, format!("{OUTSIDE}:{FORWARDED}"), LEFT)]
    {
        let mut talk = Talk::start(from, &to);
        talk.becomes_fast(&net);
        let before = fast_packets(&flow(&net, talk.port()).expect("it is known"));
        talk.transfer(BYTES);
        let found = flow(&net, talk.port()).expect("it is known");
        let after = fast_packets(&found);
        // Full-sized segments one way, and the acknowledgements.
        let segments = (BYTES / 1460) as u64;
        assert!((0..2).all(|way| after[way] >= before[way] + segments * 9 / 10), "{before:?} {after:?} of {segments}");
        assert!(is_fast(&found), "{found}");
        let seen = [&found["reply"]["destination"], &found["reply"]["source"]];
        assert!(seen.contains(&&source.into()), "translated: {found}");
        assert_eq!(
            [&found["original"]["in"], &found["original"]["out"]],
            [&found["reply"]["out"], &found["reply"]["in"]]
        );
        talk.exchange(3);
        assert_eq!(tracked(&net, talk.port()).len(), 1, "Linux has it all the time");
    }
    let status = net.json(&["status"]);
    assert_eq!(status["flows"]["mode"], "established");
    assert_eq!((&status["flows"]["refused"], &status["flows"]["capacity"]), (&0.into(), &65_536.into()));
    assert!(net.exceptions("flow-new") > 0, "the first packets were Linux's");
}

#[test]
fn ipv6_and_udp_go_fast_too() {
    let net = firewall();
    let _daemon = up(&net);
    let pulse = Pulse::start(&net, 7002);
    pulse.becomes_fast(&net);
    pulse.goes_on();
    let six = Pulse::between(&net.left, &net.right, (RIGHT6, 7003));
    six.becomes_fast(&net);
    six.goes_on();
    echo(&net.right, &format!("[{RIGHT6}]:7004"));
    let mut talk = Talk::start(&net.left, &format!("[{RIGHT6}]:7004"));
    talk.becomes_fast(&net);
    talk.transfer(1 << 20);
}

#[test]
fn a_flowtable_hands_connections_over() {
    let net = firewall();
    let flowtable = "add flowtable inet filter f { hook ingress priority 0; devices = { eth0, eth1 }; }";
    if !supported("flowtables of nftables", || net.router.run(["nft", flowtable]).map(drop)) {
        return;
    }
    let add = "insert rule inet filter forward meta l4proto { tcp, udp } flow add @f";
    net.router.run(["nft", add]).expect("a rule");
    let _daemon = net.up(&["eth0", "eth1"]);
    echoes(&net);
    let pulse = Pulse::start(&net, 7002);
    let mut talk = Talk::start(&net.left, &format!("{RIGHT}:7001"));
    for port in [talk.port(), pulse.port] {
        if port == pulse.port {
            pulse.becomes_fast(&net)
        } else {
            talk.becomes_fast(&net)
        }
        let entry = tracked(&net, port).concat();
        assert!(entry.contains("[OFFLOAD]"), "{entry}");
    }
    talk.transfer(1 << 20);
    assert_eq!(net.json(&["status"])["flows"]["mode"], "flowtable");
    // Without the rule, Linux hands over none that is new.
    let rules = net.exec("nft -a list chain inet filter forward");
    let handle = rules.lines().find(|line| line.contains("flow add")).and_then(|line| line.rsplit(' ').next());
    net.exec(&format!("nft delete rule inet filter forward handle {}", handle.expect("the rule")));
    let mut other = Talk::start(&net.left, &format!("{RIGHT}:7001"));
    other.exchange(100);
    let entry = tracked(&net, other.port()).concat();
    assert!(entry.contains("ASSURED") && !entry.contains("OFFLOAD"), "{entry}");
    assert_eq!(flow(&net, other.port()), None);
}

#[test]
fn a_rule_that_drops_a_connection_stops_it() {
    let net = firewall();
    let _daemon = up(&net);
    let pulse = Pulse::start(&net, 7002);
    let mut times = Vec::new();
    for _ in 0..5 {
        pulse.becomes_fast(&net);
        net.router.run(["nft", "insert rule inet filter forward udp dport 7002 drop"]).expect("a rule");
        let begin = Instant::now();
        times.push(pulse.ends(begin, LEAK));
        let found = flow(&net, pulse.port).expect("it is known");
        assert_eq!(found["original"]["state"], "waiting", "Linux accepts nothing of it: {found}");
        let handle = net.exec("nft -a list chain inet filter forward");
        let handle = handle.lines().find(|line| line.contains("7002")).expect("the rule");
        let handle = handle.rsplit(' ').next().expect("a handle").to_owned();
        net.exec(&format!("nft delete rule inet filter forward handle {handle}"));
        pulse.goes_on();
    }
    times.sort();
    println!("stopped after {times:?}");
    assert!(times.iter().all(|time| *time < LEAK), "{times:?}");
}

#[test]
fn a_change_of_rules_lets_a_connection_be_fast_only_after_linux_forwarded_a_packet() {
    let net = firewall();
    let _daemon = up(&net);
    echoes(&net);
    let mut talk = Talk::start(&net.left, &format!("{RIGHT}:7001"));
    talk.becomes_fast(&net);
    for port in 100..105 {
        let before = net.exceptions("flow-waiting");
        net.exec(&format!("nft add element inet filter stopped {{ {port} }}"));
        eventually("it waits", || {
            let found = flow(&net, talk.port())?;
            ["original", "reply"].iter().all(|way| found[way]["state"] == "waiting").then_some(())
        });
        assert!(flow(&net, talk.port()).is_some_and(|found| !is_fast(&found)), "nothing comes, nothing is accepted");
        talk.becomes_fast(&net);
        assert!(net.exceptions("flow-waiting") >= before + 2, "a packet each way at least");
    }
}

/// A packet that has waited for its neighbour since before the rules changed leaves by the old ones, but nothing follows it.
#[test]
fn what_waited_for_its_neighbour_does_not_count_for_new_rules() {
    let net = firewall();
    // So that it waits as long as the test takes.
    net.router.sysctl("net.ipv4.neigh.eth1.mcast_solicit", "1000").expect("set");
    let _daemon = up(&net);
    let server = net.right.enter(|| UdpSocket::bind((RIGHT, 7002))).expect("in the node").expect("bound");
    let client = net.left.enter(|| UdpSocket::bind((LEFT, 4000))).expect("in the node").expect("bound");
    client.connect((RIGHT, 7002)).expect("connected");
    server.set_read_timeout(Some(DEADLINE)).expect("set");
    client.set_read_timeout(Some(DEADLINE)).expect("set");
    let packets = || fast_packets(&flow(&net, 4000).expect("it is known"));
    eventually("the connection goes fast", || {
        client.send(b"there").expect("sent");
        let (_, from) = server.recv_from(&mut [0; 8]).expect("a packet");
        server.send_to(b"back", from).expect("sent");
        client.recv(&mut [0; 8]).expect("an answer");
        is_fast(&flow(&net, 4000)?).then_some(())
    });
    // Shows when what is accepted passes again.
    let other = Pulse::between(&net.left, &net.right, (RIGHT6, 7003));
    other.becomes_fast(&net);

    // The right neither answers ARP nor asks.
    let router = net.right.sh(&format!("ip neigh show {OUTSIDE} dev up0")).expect("its neighbour");
    let mac = router.split_whitespace().find(|word| word.contains(':')).expect("a MAC address").to_owned();
    let keep = format!("ip neigh replace {OUTSIDE} lladdr {mac} dev up0 nud permanent");
    net.right.sh(&keep).expect("kept");
    net.right.sysctl("net.ipv4.conf.up0.arp_ignore", "8").expect("set");
    net.exec("ip -4 neigh flush dev eth1 nud all");
    let unresolved = net.exceptions("no-neighbour");
    let fast = packets();
    client.send(b"waits").expect("sent");
    eventually("it waits for its neighbour", || net.ip("neigh show dev eth1").contains("INCOMPLETE").then_some(()));
    assert_eq!((net.exceptions("no-neighbour") > unresolved, packets()), (true, fast), "it is Linux's");
    net.router.run(["nft", "insert rule inet filter forward udp dport 7002 drop"]).expect("a rule");
    eventually("the rules have changed", || {
        flow(&net, 4000).is_some_and(|found| found["original"]["state"] == "waiting").then_some(())
    });
    other.becomes_fast(&net);

    net.right.sysctl("net.ipv4.conf.up0.arp_ignore", "0").expect("set");
    let mut packet = [0; 8];
    let (length, _) = server.recv_from(&mut packet).expect("as with Linux alone");
    assert_eq!(&packet[..length], b"waits");
    is_dropped_by_linux(&net, (&client, &server), fast);
}

/// A packet that a program has held since before the rules changed goes on by the old ones, but nothing follows it.
#[test]
fn what_a_program_held_does_not_count_for_new_rules() {
    let net = firewall();
    let _daemon = up(&net);
    let server = net.right.enter(|| UdpSocket::bind((RIGHT, 7002))).expect("in the node").expect("bound");
    let client = net.left.enter(|| UdpSocket::bind((LEFT, 4000))).expect("in the node").expect("bound");
    client.connect((RIGHT, 7002)).expect("connected");
    [&server, &client].iter().for_each(|socket| socket.set_read_timeout(Some(DEADLINE)).expect("set"));
    eventually("the connection goes fast", || {
        client.send(b"there").expect("sent");
        let (_, from) = server.recv_from(&mut [0; 8]).expect("a packet");
        server.send_to(b"back", from).expect("sent");
        client.recv(&mut [0; 8]).expect("an answer");
        is_fast(&flow(&net, 4000)?).then_some(())
    });
    let packets = || fast_packets(&flow(&net, 4000).expect("it is known"));
    let fast = packets();

    let queue = Queue::listen(&net.router);
    let rule = "insert rule inet filter forward udp dport 7002 queue num 0";
    if !supported("queues of nftables", || net.router.run(["nft", rule]).map(drop)) {
        return;
    }
    client.send(b"held").expect("sent");
    let held = queue.packet();
    let rules = net.exec("nft -a list chain inet filter forward");
    let line = rules.lines().find(|line| line.contains("queue")).expect("the rule");
    let handle = line.rsplit(' ').next().expect("a handle");
    let instead =
        format!("delete rule inet filter forward handle {handle}; insert rule inet filter forward udp dport 7002 drop");
    net.router.run(["nft", &instead]).expect("rules");
    let says = |text: &str| net.json(&["status"])["policies"].to_string().contains(text);
    eventually("the rules have changed", || (!says("chain forward: queue")).then_some(()));
    eventually("they are not new any more", || (net.json(&["status"])["flows"]["gate"] == "open").then_some(()));
    assert!(says("netfilter queue 0: a program may hold packets"));
    queue.accept(held);
    let mut packet = [0; 8];
    let (length, _) = server.recv_from(&mut packet).expect("as with Linux alone");
    assert_eq!(&packet[..length], b"held");
    drop(queue);

    let other = Pulse::between(&net.left, &net.right, (RIGHT6, 7003));
    other.becomes_fast(&net);
    is_dropped_by_linux(&net, (&client, &server), fast);
}

/// All else that the connection from port 4000 has is Linux's, which drops it; so many packets were fast.
fn is_dropped_by_linux(net: &Net, (client, server): (&UdpSocket, &UdpSocket), fast: [u64; 2]) {
    eventually("the rest is Linux's", || {
        client.send(b"more").expect("sent");
        (net.exceptions("flow-waiting") >= 20).then_some(())
    });
    let found = flow(net, 4000).expect("it is known");
    assert_eq!((&found["original"]["state"], fast_packets(&found)), (&"waiting".into(), fast), "{found}");
    server.set_nonblocking(true).expect("set");
    assert!(server.recv_from(&mut [0; 8]).is_err(), "the rule drops it");
}

/// Whoever is to tell of rules is gone, or does nothing.
#[test]
fn without_a_daemon_connections_are_linuxs_soon_and_lose_nothing() {
    for signal in [libc::SIGKILL, libc::SIGSTOP] {
        let net = firewall();
        net.router.run(["nft", "insert rule inet filter forward udp dport 7005 counter"]).expect("a rule");
        let counted = || counted(&net);
        let mut daemon = up(&net);
        let (pulse, asker) = (Pulse::start(&net, 7002), Asker::start(&net, 7005));
        pulse.becomes_fast(&net);
        asker.becomes_fast(&net);
        let before = counted();
        asker.ask(20);
        assert_eq!(counted(), before, "Linux does not see them");
        daemon.send(signal);
        let begin = Instant::now();
        net.router.run(["nft", "insert rule inet filter forward udp dport 7002 drop"]).expect("a rule");
        eventually("Linux carries the other connection", || {
            asker.ask(10);
            (counted() >= before + 10).then_some(())
        });
        let after = pulse.ends(begin, LEAK);
        println!("stopped after {after:?}");
        assert!(after < Duration::from_nanos(LEASE) + LEAK, "{after:?}");
        asker.ask(100);
        // Another one, or the same one that goes on.
        let _again = match signal {
            libc::SIGKILL => Some(up(&net)),
            _ => {
                daemon.send(libc::SIGCONT);
                None
            }
        };
        asker.becomes_fast(&net);
        assert!(net.exceptions("flow-unwatched") > 0);
        assert!(pulse.last().is_some_and(|last| last.elapsed() > LEAK), "it is dropped as before");
    }
}

/// What is dropped after so many bytes is dropped after as many with Towpath, though the connection was fast before.
#[test]
fn a_quota_ends_a_connection_as_it_does_in_linux() {
    const SENT: u64 = 60;
    let delivered = [false, true].map(|towpath| {
        let net = firewall();
        let _daemon = towpath.then(|| up(&net));
        let asker = Asker::start(&net, 7005);
        asker.ask(10);
        if towpath {
            asker.becomes_fast(&net);
        }
        let quota = "insert rule inet filter forward udp dport 7002 quota over 20000 bytes counter drop";
        net.router.run(["nft", quota]).expect("a rule");
        if towpath {
            let packet = ["explain", LEFT, RIGHT, "in", "eth0", "--protocol", "udp", "--sport", "1", "--dport", "7002"];
            eventually("no connection may pass", || {
                let verdict = net.json(&packet)["verdict"].clone();
                let why = verdict["detail"].as_str()?;
                let quota = why.contains("chain forward: quota may answer each packet differently");
                (quota && verdict["reason"] == "policy-netfilter").then_some(())
            });
        }
        let server = net.right.enter(|| UdpSocket::bind((RIGHT, 7002))).expect("in the node").expect("bound");
        let client = net.left.enter(|| UdpSocket::bind((LEFT, 4000))).expect("in the node").expect("bound");
        client.connect((RIGHT, 7002)).expect("connected");
        server.set_nonblocking(true).expect("set");
        let mut came = 0;
        for sent in 1..=SENT {
            client.send(&[7; 972]).expect("sent");
            eventually("it came, or was dropped", || {
                if let Ok((length, from)) = server.recv_from(&mut [0; 1000]) {
                    came += 1;
                    server.send_to(&[7; 10], from).expect("sent");
                    assert_eq!(length, 972);
                }
                (came + counted(&net) == sent).then_some(())
            });
        }
        if towpath {
            assert_eq!(flow(&net, 4000).map_or([0, 0], |found| fast_packets(&found)), [0, 0]);
            net.router
                .run(["nft", "flush chain inet filter forward; add rule inet filter forward accept"])
                .expect("rules");
            asker.becomes_fast(&net);
        }
        came
    });
    assert_eq!(delivered, [20, 20], "of 1000 bytes each");
}

/// Packets that the first counter of the forward chain has seen.
fn counted(net: &Net) -> u64 {
    let rules = net.exec("nft list chain inet filter forward");
    let words: Vec<_> = rules.split_whitespace().collect();
    let at = words.iter().position(|word| *word == "packets").expect("a counter");
    words[at + 1].parse().expect("a number")
}

#[test]
fn a_deleted_connection_stops() {
    let net = firewall();
    let _daemon = up(&net);
    let pulse = Pulse::start(&net, 7002);
    pulse.becomes_fast(&net);
    // What begins anew is not let through.
    net.exec("nft add element inet filter stopped { 7002 }");
    pulse.becomes_fast(&net);
    net.exec(&format!("conntrack -D -p udp --sport {}", pulse.port));
    let begin = Instant::now();
    stops(&pulse, begin);
    assert_eq!(flow(&net, pulse.port), None);
    assert!(net.exceptions("flow-new") > 0);
}

#[test]
fn a_connection_whose_mark_changes_stops_where_a_rule_says_so() {
    let net = firewall();
    net.router.run(["nft", "insert rule inet filter forward ct mark 5 drop"]).expect("a rule");
    let _daemon = up(&net);
    // Entries with addresses translated cannot be changed by this command.
    let pulse = Pulse::between(&net.left, &net.right, (RIGHT6, 7003));
    pulse.becomes_fast(&net);
    let mark = |mark: u32| net.exec(&format!("conntrack -U -f ipv6 -p udp --sport {} --mark {mark}", pulse.port));
    mark(5);
    let begin = Instant::now();
    stops(&pulse, begin);
    let found = flow(&net, pulse.port).expect("it is known");
    assert_eq!(found["original"]["state"], "waiting", "Linux accepts nothing of it: {found}");
    mark(6);
    pulse.becomes_fast(&net);
}

#[test]
fn an_interface_in_another_group_stops_what_rules_drop_for_it() {
    let net = firewall();
    net.router.run(["nft", "insert rule inet filter forward iifgroup 7 drop"]).expect("a rule");
    let _daemon = up(&net);
    let pulse = Pulse::start(&net, 7002);
    for _ in 0..3 {
        pulse.becomes_fast(&net);
        net.exec("ip link set dev eth0 group 7");
        let begin = Instant::now();
        stops(&pulse, begin);
        let found = flow(&net, pulse.port).expect("it is known");
        assert_eq!(found["original"]["state"], "waiting", "Linux accepts nothing of it: {found}");
        net.exec("ip link set dev eth0 group 0");
    }
    pulse.becomes_fast(&net);
}

#[test]
fn a_rule_that_looks_for_the_way_back_holds_when_routes_change() {
    let net = firewall();
    let rules = "table inet back { counter lost { }; chain pre { type filter hook prerouting priority mangle; \
                 fib saddr . iif oif missing counter name lost drop; }; }";
    if !supported("fib in rules of nftables", || net.router.run(["nft", rules]).map(drop)) {
        return;
    }
    let daemon = up(&net);
    let pulse = Pulse::start(&net, 7002);
    pulse.becomes_fast(&net);
    let lost = || {
        let all = net.exec("nft -j list counters table inet back");
        let all: serde_json::Value = serde_json::from_str(&all).expect("JSON");
        let counter =
            all["nftables"].as_array().expect("a list").iter().find_map(|of| of["counter"]["packets"].as_u64());
        counter.expect("a counter")
    };
    assert_eq!(lost(), 0);
    // What comes from the left does not come by the way back any more.
    net.exec(&format!("ip route add {LEFT}/32 dev eth1"));
    eventually("Linux drops", || (lost() > 100).then_some(()));
    let found = || flow(&net, pulse.port).expect("it is known");
    let fast = fast_packets(&found())[0];
    // Until routes have stood for a moment nothing passes; from then on Linux has to accept it, and does not.
    eventually("it waits", || (found()["original"]["state"] == "waiting").then_some(()));
    let before = lost();
    eventually("Linux drops", || (lost() > before + 100).then_some(()));
    let found = found();
    assert_eq!((fast_packets(&found)[0], &found["original"]["state"]), (fast, &"waiting".into()), "{found}");
    net.exec(&format!("ip route del {LEFT}/32 dev eth1"));
    pulse.becomes_fast(&net);
    let log = daemon.log();
    assert!(!log.contains("just changed"), "what stands in the way for a moment is no news: {log}");
}

#[test]
fn the_end_of_a_connection_is_linuxs() {
    let net = firewall();
    let _daemon = up(&net);
    echoes(&net);
    let field = |port, place| {
        tracked(&net, port).first().and_then(|line| line.split_whitespace().nth(place).map(str::to_owned))
    };
    let state = |port| field(port, 3);
    let gone = |port| eventually("the flow is gone", || flow(&net, port).is_none().then_some(()));

    let mut talk = Talk::start(&net.left, &format!("{RIGHT}:7001"));
    talk.becomes_fast(&net);
    assert_eq!(state(talk.port()).as_deref(), Some("ESTABLISHED"));
    // The answer may come when the flow has gone already.
    let ends = || net.exceptions("flow-closing") + net.exceptions("flow-new");
    let (before, first) = (ends(), net.exceptions("flow-closing"));
    let port = talk.port();
    talk.stream.shutdown(Shutdown::Write).expect("FIN");
    let mut rest = Vec::new();
    std::io::Read::read_to_end(&mut talk.stream, &mut rest).expect("the other end's FIN");
    assert!(rest.is_empty());
    eventually("conntrack waits", || (state(port).as_deref() == Some("TIME_WAIT")).then_some(()));
    gone(port);
    assert!(ends() >= before + 2 && net.exceptions("flow-closing") > first, "both FINs");

    let mut talk = Talk::start(&net.left, &format!("{RIGHT}:7001"));
    talk.becomes_fast(&net);
    let port = talk.port();
    reset(talk);
    // Linux has not seen the last sequence numbers: it may wait for a challenge, but not for long.
    eventually("conntrack waits for a moment only", || {
        field(port, 2).is_none_or(|seconds| seconds.parse::<u32>().is_ok_and(|seconds| seconds <= 10)).then_some(())
    });
    assert!(flow(&net, port).is_none_or(|found| found["original"]["state"] == "closing"));
    // Linux forgets it when somebody looks at it, or it tidies up.
    eventually("the flow is gone", || (tracked(&net, port).is_empty() && flow(&net, port).is_none()).then_some(()));
}

/// Ends a connection by RST.
fn reset(talk: Talk) {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    // SAFETY: pointer and length describe `linger`, which lives across the call; the socket is open.
    let ret = unsafe {
        let (value, length) = ((&raw const linger).cast(), size_of_val(&linger) as u32);
        libc::setsockopt(talk.stream.as_raw_fd(), libc::SOL_SOCKET, libc::SO_LINGER, value, length)
    };
    assert_eq!(ret, 0, "{}", std::io::Error::last_os_error());
}

#[test]
fn connections_in_use_stay_and_idle_ones_go() {
    const TIMEOUT: u64 = 12;
    let net = firewall();
    for name in ["tcp_timeout_established", "udp_timeout", "udp_timeout_stream"] {
        net.router.sysctl(&format!("net.netfilter.nf_conntrack_{name}"), &TIMEOUT.to_string()).expect("set");
    }
    let _daemon = up(&net);
    echoes(&net);
    let (used, idle) = (Pulse::start(&net, 7002), Pulse::start(&net, 7005));
    let [mut talk, mut silent] = [(); 2].map(|()| Talk::start(&net.left, &format!("{RIGHT}:7001")));
    for talk in [&mut talk, &mut silent] {
        talk.becomes_fast(&net);
    }
    for pulse in [&used, &idle] {
        pulse.becomes_fast(&net);
    }
    let (idle_port, silent_port) = (idle.port, silent.port());
    drop(idle);
    let begin = Instant::now();
    let exceptions = || ["flow-new", "flow-waiting", "flow-closing"].map(|reason| net.exceptions(reason));
    talk.exchange(1);
    let before = exceptions();
    let mut went = [None; 2];
    while begin.elapsed() < Duration::from_secs(3 * TIMEOUT) {
        talk.exchange(1);
        for (port, went) in [idle_port, silent_port].into_iter().zip(&mut went) {
            if went.is_none() && tracked(&net, port).is_empty() {
                *went = Some(begin.elapsed());
            }
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(exceptions(), before, "no packet of those in use was Linux's");
    for port in [used.port, talk.port()] {
        assert!(flow(&net, port).is_some_and(|found| is_fast(&found)), "{port}");
    }
    println!("idle ones went after {went:?}");
    let limits = Duration::from_secs(TIMEOUT - 2)..Duration::from_secs(TIMEOUT + 8);
    assert!(went.iter().all(|went| went.is_some_and(|went| limits.contains(&went))), "{went:?}");
    eventually("the flows are gone", || {
        [idle_port, silent_port].iter().all(|port| flow(&net, *port).is_none()).then_some(())
    });
    used.goes_on();
    talk.exchange(1);
}

#[test]
fn without_flows_everything_is_linuxs() {
    let net = firewall();
    for arguments in [["--flows", "none"], ["--max-flows", "0"]] {
        let mut daemon = net.up(&[&arguments[..], &["eth0", "eth1"]].concat());
        let pulse = Pulse::start(&net, 7002);
        pulse.goes_on();
        let before = (net.exceptions("policy-conntrack") + net.exceptions("policy-netfilter"), net.forwarded());
        eventually("packets are Linux's", || {
            (net.exceptions("policy-conntrack") + net.exceptions("policy-netfilter") >= before.0 + 100).then_some(())
        });
        assert_eq!(net.forwarded(), before.1);
        let status = net.json(&["status"]);
        assert_eq!((&status["flows"]["mode"], &status["flows"]["capacity"]), (&"none".into(), &0.into()));
        assert_eq!(net.json(&["show", "flows"])["flows"], serde_json::json!([]));
        assert_eq!(daemon.signal(libc::SIGTERM).code(), Some(0));
    }
}

#[test]
fn marked_connections_go_fast_and_others_do_not() {
    let net = firewall();
    net.router.run(["nft", "insert rule inet filter forward udp dport 7002 ct mark set 0x10"]).expect("a rule");
    let _daemon = net.up(&["--flows", "mark=0x10/0xf0", "eth0", "eth1"]);
    let (marked, other) = (Pulse::start(&net, 7002), Pulse::start(&net, 7005));
    marked.becomes_fast(&net);
    other.goes_on();
    assert_eq!(flow(&net, other.port), None);
}

#[test]
fn connections_stay_in_linux_while_rules_ask_for_marks() {
    let net = firewall();
    let mark = "add table inet marks; \
        add chain inet marks in { type filter hook prerouting priority mangle; }; \
        add rule inet marks in udp dport 7002 meta mark set 7";
    net.router.run(["nft", mark]).expect("marks");
    let _daemon = up(&net);
    let (marked, other) = (Pulse::start(&net, 7002), Pulse::start(&net, 7005));
    net.ip("-6 rule add fwmark 7 prohibit");
    marked.becomes_fast(&net);
    other.becomes_fast(&net);
    net.ip("rule add fwmark 7 prohibit");
    let begin = Instant::now();
    stops(&marked, begin);
    let fast = || fast_packets(&flow(&net, other.port).expect("it is known"));
    let before = fast();
    other.goes_on();
    assert_eq!(fast(), before, "the other one is Linux's");
    let policies = net.json(&["status"])["policies"].to_string();
    assert!(policies.contains("by marks, so connections stay in Linux"), "{policies}");
    net.ip("rule delete fwmark 7 prohibit");
    marked.becomes_fast(&net);
    other.becomes_fast(&net);
}

#[test]
fn no_connection_is_called_fast_that_a_setting_keeps_in_linux() {
    let net = firewall();
    let _daemon = up(&net);
    let pulse = Pulse::start(&net, 7002);
    let found = || flow(&net, pulse.port).expect("it is known");
    let summary = || {
        let flows = &net.json(&["status"])["flows"];
        [&flows["fast"], &flows["waiting"]].map(|count| count.as_u64().expect("a count"))
    };
    for (set, unset, way) in [
        (
            "ip xfrm policy add dir fwd src 203.0.113.0/24 dst 203.0.113.0/24 action block",
            "ip xfrm policy deleteall",
            ["original", "reply"].as_slice(),
        ),
        (
            "tc qdisc replace dev eth1 root tbf rate 80mbit burst 20k latency 10ms",
            "tc qdisc delete dev eth1 root",
            &["original"],
        ),
    ] {
        pulse.becomes_fast(&net);
        net.exec(set);
        let stopped = eventually("the fast path carries none of it", || {
            let before = fast_packets(&found());
            pulse.goes_on();
            pulse.goes_on();
            let after = found();
            (fast_packets(&after)[0] == before[0]).then_some(after)
        });
        for way in way {
            assert_eq!(stopped[way]["state"], "waiting", "{set}: {stopped}");
            assert!(stopped[way]["in"].is_null() && stopped[way]["out"].is_null(), "{set}: {stopped}");
        }
        assert_eq!(summary(), if way.len() == 2 { [0, 1] } else { [1, 0] }, "{set}");
        net.exec(unset);
    }
    pulse.becomes_fast(&net);
    assert_eq!(summary(), [1, 0]);
}

#[test]
fn what_finds_no_room_stays_in_linux_and_is_counted() {
    let net = firewall();
    let mut daemon = net.up(&["--flows", "established", "--max-flows", "1", "eth0", "eth1"]);
    let first = Pulse::start(&net, 7002);
    first.becomes_fast(&net);
    let second = Pulse::start(&net, 7005);
    second.goes_on();
    eventually("it is counted", || (net.json(&["status"])["flows"]["refused"].as_u64()? > 0).then_some(()));
    daemon.await_log("--max-flows");
    let notices = net.json(&["status"])["notices"].to_string();
    assert!(notices.contains("--max-flows"), "{notices}");
    assert_eq!(flow(&net, second.port), None);
    second.goes_on();
    first.goes_on();
}

#[test]
fn a_restart_goes_on_with_connections() {
    let net = firewall();
    let mut daemon = up(&net);
    echoes(&net);
    let mut talk = Talk::start(&net.left, &format!("{RIGHT}:7001"));
    talk.becomes_fast(&net);
    daemon.signal(libc::SIGKILL);
    talk.exchange(10);
    let again = up(&net);
    assert_eq!(net.json(&["status"])["adopted"], true);
    talk.becomes_fast(&net);
    talk.transfer(1 << 20);
    // With other room, by other tables.
    drop(again);
    let other = net.up(&["--flows", "established", "--max-flows", "100", "eth0", "eth1"]);
    assert_eq!(net.json(&["status"])["flows"]["capacity"], 100);
    talk.becomes_fast(&net);
    drop(other);
    assert!(net.towpath(&["down"]).status.success());
    talk.exchange(10);
}

#[test]
fn managers_of_their_own_do_the_same() {
    let net = firewall();
    let start = |arguments: &[&str]| {
        let mut command = net.router.command(env!("CARGO_BIN_EXE_towpath"));
        command.args(arguments);
        net.start(command)
    };
    let mut fpm = start(&["fpm", "--max-flows", "100", "eth0", "eth1"]);
    let mut cm = start(&["cm", "--flows", "established"]);
    fpm.await_log("ready: 2 ports, ");
    assert!(net.json(&["status"])["flows"]["mode"].is_null());
    echoes(&net);
    let mut talk = Talk::start(&net.left, &format!("{RIGHT}:7001"));
    talk.becomes_fast(&net);
    // Nobody sees rules change.
    cm.send(libc::SIGSTOP);
    eventually("it is Linux's", || {
        talk.exchange(1);
        (net.exceptions("flow-unwatched") > 0).then_some(())
    });
    cm.send(libc::SIGCONT);
    talk.becomes_fast(&net);
    // Nobody would see them.
    cm.signal(libc::SIGKILL);
    eventually("it is Linux's", || flow(&net, talk.port()).is_some_and(|found| !is_fast(&found)).then_some(()));
    talk.exchange(10);
    assert!(!is_fast(&flow(&net, talk.port()).expect("it is known")));
    let _cm = start(&["cm", "--flows", "established"]);
    talk.becomes_fast(&net);
}

#[test]
fn explain_says_why_a_connection_is_fast_or_not() {
    let net = firewall();
    let _daemon = up(&net);
    echoes(&net);
    let mut talk = Talk::start(&net.left, &format!("{RIGHT}:7001"));
    talk.becomes_fast(&net);
    let ports = [talk.port().to_string(), "7001".to_owned()];
    let explain = |ports: &[String; 2]| {
        let [sport, dport] = ports;
        let packet = ["explain", LEFT, RIGHT, "in", "eth0", "--protocol", "tcp", "--sport", sport, "--dport", dport];
        net.json(&packet)
    };
    let packets = || fast_packets(&flow(&net, talk.port()).expect("it is known"));
    let before = eventually("the last acknowledgement has passed", || {
        let before = packets();
        std::thread::sleep(Duration::from_millis(200));
        (packets() == before).then_some(before)
    });
    let fast = explain(&ports);
    assert_eq!((&fast["verdict"]["path"], &fast["verdict"]["port"]), (&"fast".into(), &"eth1".into()), "{fast}");
    assert!(fast["steps"].to_string().contains(OUTSIDE), "translated: {fast}");
    assert_eq!(packets(), before, "a made-up packet is not counted");
    let reason = |explained: &serde_json::Value| explained["verdict"]["reason"].as_str().unwrap_or("fast").to_owned();
    let other = explain(&["1".into(), "7001".into()]);
    assert_eq!(reason(&other), "flow-new", "{other}");
    net.exec("nft add element inet filter stopped { 100 }");
    eventually("it waits", || (reason(&explain(&ports)) == "flow-waiting").then_some(()));
    talk.becomes_fast(&net);
    // What no connection passes is named.
    let zone = "add table ip other; \
        add chain ip other zones { type filter hook prerouting priority raw; }; \
        add rule ip other zones udp dport 1 ct zone set 1";
    net.router.run(["nft", zone]).expect("a zone");
    let refused = eventually("it is a policy's", || {
        let explained = explain(&ports);
        (reason(&explained) == "policy-netfilter").then_some(explained)
    });
    let detail = refused["verdict"]["detail"].to_string();
    assert!(detail.contains("ct zone set") && !detail.contains("chain forward"), "{refused}");
}
