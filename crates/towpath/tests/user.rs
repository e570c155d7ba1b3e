//! The user engine: the same router, with workers in user space and AF_XDP sockets.

mod common;

use common::{LEFT, LEFT6, Net, RIGHT, RIGHT6, Stream, eventually};
use std::net::UdpSocket;
use std::os::unix::process::CommandExt;

const UP: [&str; 4] = ["--engine", "user", "eth0", "eth1"];

/// Sums over the workers of a field of the status.
fn workers(net: &Net, field: &str) -> u64 {
    let status = net.json(&["status"]);
    assert_eq!(status["engine"], "user");
    status["workers"].as_array().expect("workers").iter().map(|worker| worker[field].as_u64().expect("count")).sum()
}

/// Waits until the workers have forwarded so many packets more, and nobody else has.
fn workers_forward(net: &Net, more: u64) {
    let before = workers(net, "rx_packets");
    net.flows(more);
    let after = workers(net, "rx_packets");
    assert!(after >= before + more, "{} of {more} by the workers", after - before);
}

fn nothing_is_lost(net: &Net) {
    let lost = ["rx_lost", "tx_lost", "exceptions_lost"].map(|field| workers(net, field));
    assert_eq!(lost, [0; 3]);
}

#[test]
fn workers_forward_and_down_gives_back_to_linux_without_loss() {
    let net = Net::new();
    let clean = net.traces();
    for (destination, from) in [(RIGHT, LEFT), (RIGHT6, LEFT6)] {
        let stream = Stream::start(&net, destination);
        let mut daemon = net.up(&UP);
        for port in net.json(&["show", "ports"])["ports"].as_array().unwrap() {
            assert_eq!((&port["mode"], &port["ready"]), (&"user".into(), &true.into()));
        }
        workers_forward(&net, 200);
        assert!(net.ping(&net.right, from), "replies come back");
        nothing_is_lost(&net);
        let down = net.towpath(&["down"]);
        assert!(down.status.success(), "{}", String::from_utf8_lossy(&down.stderr));
        assert!(daemon.wait().success());
        assert_eq!(net.traces(), clean);
        stream.finish_complete();
    }
}

/// How often the workers' threads have gone to sleep.
fn naps(pid: u32) -> u64 {
    let of_worker = |task: std::fs::DirEntry| {
        let status = std::fs::read_to_string(task.path().join("status")).ok()?;
        let field = |name: &str| Some(status.lines().find_map(|line| line.strip_prefix(name))?.trim().to_string());
        let worker = field("Name:")?.starts_with("worker-");
        let naps = field("voluntary_ctxt_switches:")?.parse::<u64>().ok()?;
        (worker && field("State:")?.starts_with('S')).then_some(naps)
    };
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).expect("tasks");
    let naps: Vec<_> = tasks.flatten().filter_map(of_worker).collect();
    // None sleeps at this moment: then no two looks are alike.
    if naps.is_empty() { u64::MAX } else { naps.iter().sum() }
}

#[test]
fn workers_without_work_sleep() {
    let net = Net::new();
    let daemon = net.up(&UP);
    let stream = Stream::start(&net, RIGHT);
    workers_forward(&net, 100);
    stream.finish_complete();
    // Now and then IPv6 has something to say.
    eventually("the workers sleep through a fifth of a second", || {
        let before = naps(daemon.pid());
        std::thread::sleep(std::time::Duration::from_millis(200));
        (before != u64::MAX && naps(daemon.pid()).abs_diff(before) < 20).then_some(())
    });
}

#[test]
fn what_is_for_the_router_itself_reaches_it_and_is_counted() {
    let net = Net::new();
    let _daemon = net.up(&UP);
    for (host, own) in [(&net.left, "192.0.2.1"), (&net.right, "198.51.100.1"), (&net.left, "2001:db8:2::1")] {
        let before = (workers(&net, "exceptions"), net.exceptions("local-destination"));
        host.run(["ping", "-c5", "-i0.01", "-W5", "-q", "-s1400", own]).expect("answers");
        let after = (workers(&net, "exceptions"), net.exceptions("local-destination"));
        assert!(after.0 >= before.0 + 5 && after.1 >= before.1 + 5, "{own}: {before:?}, {after:?}");
    }
    // Linux answers as the router that it is.
    let expired = net.left.command("ping").args(["-n", "-c1", "-t1", "-W5", RIGHT]).output().expect("run");
    let text = String::from_utf8_lossy(&expired.stdout);
    assert!(text.contains("From 192.0.2.1") && text.contains("Time to live exceeded"), "{text}");
    nothing_is_lost(&net);
}

/// How many packets are said to have become this on their way from workers to Linux.
fn entered(list: &serde_json::Value, outcome: &str) -> Option<u64> {
    let list = list["fptun"].as_array().expect("counters");
    list.iter().find(|entered| entered["outcome"] == outcome)?["packets"].as_u64()
}

#[test]
fn what_enters_linux_is_counted_and_so_is_what_others_send_there() {
    let net = Net::new();
    let _daemon = net.up(&["--metrics=127.0.0.1:9", "--engine", "user", "eth0", "eth1"]);
    let before = workers(&net, "exceptions");
    net.left.run(["ping", "-c5", "-i0.01", "-W5", "-q", "192.0.2.1"]).expect("answers");
    let status = net.json(&["status"]);
    let handed = workers(&net, "exceptions");
    assert!(handed >= before + 5 && entered(&status, "ingress") >= Some(5), "{handed}: {}", status["fptun"]);
    assert!(entered(&status, "ingress") <= Some(handed), "{handed}: {}", status["fptun"]);
    let losses = ["no-record", "forged", "unknown", "undeliverable"];
    assert!(losses.iter().all(|loss| entered(&status, loss) == Some(0)), "{}", status["fptun"]);

    net.ip("route add 203.0.113.0/24 dev fptun");
    assert!(!net.ping(&net.router, "203.0.113.1"));
    let exceptions = net.json(&["show", "exceptions"]);
    let dropped = entered(&exceptions, "no-record");
    assert!(dropped >= Some(1) && entered(&exceptions, "ingress").is_none(), "{exceptions}");
    let metrics = net.router.run(["curl", "-s", "http://127.0.0.1:9/metrics"]).expect("metrics");
    let counted =
        metrics.lines().find_map(|line| line.strip_prefix("towpath_fptun_packets_total{outcome=\"no-record\"} "));
    assert!(counted.and_then(|count| count.parse().ok()) >= dropped, "{dropped:?}: {metrics}");
    let text = net.towpath(&["show", "exceptions"]).stdout;
    assert!(String::from_utf8_lossy(&text).contains("no record of the fast path's behind it"));
}

/// What is lost at a kill is what lay in the workers' rings, and what came until the kernel had closed their sockets.
#[test]
fn after_kill_the_program_forwards_alone_and_a_new_daemon_takes_over() {
    let net = Net::new();
    let clean = net.traces();
    let mut daemon = net.up(&UP);
    for round in 0..2 {
        let stream = Stream::start(&net, RIGHT);
        workers_forward(&net, 100);
        daemon.signal(libc::SIGKILL);
        let over = stream.sent();
        // A change that nobody is there to follow.
        net.ip(&format!("route add 203.0.113.{round}/32 via 198.51.100.2"));
        stream.advance(100);
        daemon = net.up(&UP);
        assert_eq!(net.json(&["status"])["adopted"], true);
        workers_forward(&net, 100);
        let explained = net.json(&["explain", LEFT, &format!("203.0.113.{round}"), "in", "eth0"]);
        assert_eq!(explained["verdict"]["path"], "fast");
        let (sent, lost) = stream.finish();
        println!("{} of {sent} lost at the kill", lost.len());
        if let (Some(first), Some(last)) = (lost.first(), lost.last()) {
            let workers = &net.json(&["status"])["workers"];
            assert_eq!(last - first + 1, lost.len() as u64, "one gap only: {lost:?} of {sent}; {workers}");
            assert!(*last <= over, "{last} was sent when the daemon was gone, {over}");
        }
    }
    daemon.signal(libc::SIGKILL);
    daemon.wait();
    assert!(net.traces().contains("fptun"));
    assert!(net.towpath(&["down"]).status.success());
    assert_eq!(net.traces(), clean);
}

#[test]
fn one_engine_takes_over_from_the_other_without_loss() {
    let net = Net::new();
    let mut daemon = net.up(&["--engine", "xdp", "eth0", "eth1"]);
    let stream = Stream::start(&net, RIGHT6);
    net.flows(100);
    daemon.signal(libc::SIGKILL);
    let mut daemon = net.up(&UP);
    assert_eq!(net.json(&["status"])["adopted"], true);
    workers_forward(&net, 100);
    stream.finish_complete();
    daemon.signal(libc::SIGKILL);
    let stream = Stream::start(&net, RIGHT6);
    let _daemon = net.up(&["eth0", "eth1"]);
    let status = net.json(&["status"]);
    assert_eq!((&status["engine"], &status["adopted"]), (&"xdp".into(), &true.into()));
    assert_eq!(status["workers"].as_array().map(Vec::len), Some(0));
    assert!(!net.traces().contains("fptun"), "what the killed workers left");
    net.flows(100);
    stream.finish_complete();
}

/// Two workers, and a port with two queues: frames go from worker to worker.
#[test]
fn several_workers_and_queues_lose_nothing() {
    if std::thread::available_parallelism().map_or(1, |cores| cores.get()) < 2 {
        return eprintln!("there is one core only");
    }
    let net = Net::new();
    net.ip("link delete eth1");
    net.connect_right_with("numtxqueues 2 numrxqueues 2", "numtxqueues 2 numrxqueues 2");
    eventually("the neighbours resolve", || (net.ping(&net.left, RIGHT) && net.ping(&net.left, RIGHT6)).then_some(()));
    let up = [&UP[..], &["--cores", "0-1"]].concat();
    let _daemon = net.up(&up);
    let status = net.json(&["status"]);
    let queues = |worker: usize| {
        let queues = status["workers"][worker]["queues"].as_array().expect("queues");
        queues.iter().map(|queue| format!("{}:{}", queue["port"].as_str().unwrap(), queue["queue"])).collect::<Vec<_>>()
    };
    assert_eq!((queues(0), queues(1)), (vec!["eth0:0".into(), "eth1:1".into()], vec!["eth1:0".into()]));
    for destination in [RIGHT, RIGHT6] {
        let stream = Stream::start(&net, destination);
        workers_forward(&net, 200);
        for _ in 0..20 {
            assert!(net.ping(&net.right, if destination == RIGHT { LEFT } else { LEFT6 }));
        }
        stream.finish_complete();
    }
    // The sender chooses the queue by a hash of the flow: so many flows use both.
    let flow = |_| UdpSocket::bind("0.0.0.0:0").and_then(|socket| socket.send_to(b"flow", (LEFT, 9)));
    net.right.enter(|| (0..64).try_for_each(|n| flow(n).map(drop))).expect("in the node").expect("sent");
    eventually("both workers forward", || {
        let status = net.json(&["status"]);
        [0, 1].iter().all(|worker| status["workers"][worker]["rx_packets"].as_u64() > Some(0)).then_some(())
    });
    nothing_is_lost(&net);
}

#[test]
fn workers_see_tables_that_grow() {
    let net = Net::new();
    let _daemon = net.up(&UP);
    let stream = Stream::start(&net, RIGHT);
    let capacity = || {
        let tables = net.json(&["status"])["tables"].clone();
        tables.as_array().unwrap().iter().find(|table| table["name"] == "nexthops").unwrap()["capacity"]
            .as_u64()
            .unwrap()
    };
    let before = capacity();
    let neighbours = (0..before)
        .map(|n| format!("neigh add 2001:db8:2::1:{n:x} lladdr 02:00:00:00:00:01 dev eth1\n"))
        .collect::<String>();
    net.router.sh(&format!("ip -batch - <<'END'\n{neighbours}END")).expect("neighbours");
    eventually("the table grows", || (capacity() > before).then_some(()));
    // A neighbour that has its place behind the end of the former table.
    net.right.sh("ip address add 2001:db8:2::fff/64 dev up0 nodad").expect("an address");
    eventually("it resolves", || net.ping(&net.left, "2001:db8:2::fff").then_some(()));
    eventually("the workers forward what goes there and comes back", || {
        let before = workers(&net, "rx_packets");
        net.right.run(["ping", "-c20", "-i0.01", "-q", "-I", "2001:db8:2::fff", LEFT6]).expect("answers");
        (workers(&net, "rx_packets") >= before + 40).then_some(())
    });
    assert_eq!(net.exceptions("internal"), 0);
    stream.finish_complete();
}

#[test]
fn ports_may_go_down_change_and_vanish() {
    let net = Net::new();
    let _daemon = net.up(&UP);
    let mode = || net.json(&["show", "ports"])["ports"][1]["mode"].clone();
    net.ip("link set eth1 down");
    eventually("no worker serves a port that is down", || (mode() == "native").then_some(()));
    net.ip("link set eth1 up");
    net.ip("address replace 2001:db8:2::1/64 dev eth1 nodad");
    eventually("workers serve it again", || (mode() == "user").then_some(()));
    eventually("the neighbour resolves", || (net.ping(&net.left, RIGHT) && net.ping(&net.left, RIGHT6)).then_some(()));
    let stream = Stream::start(&net, RIGHT6);
    workers_forward(&net, 100);
    stream.finish_complete();

    let stream = Stream::start(&net, RIGHT);
    for (node, device) in [(&net.right, "up0"), (&net.router, "eth1")] {
        node.run(["ip", "link", "set", device, "mtu", "1400"]).expect("set");
    }
    let mtu = || net.json(&["show", "ports"])["ports"][1]["mtu"].clone();
    eventually("the MTU is known", || (mtu() == 1400).then_some(()));
    workers_forward(&net, 100);
    assert!(net.left.run(["ping", "-c1", "-W5", "-q", "-s1372", "-Mdo", RIGHT]).is_ok(), "what fits");
    let refused = net.left.command("ping").args(["-c1", "-W5", "-s1373", "-Mdo", RIGHT]).output().expect("run");
    let text = String::from_utf8_lossy(&refused.stdout);
    assert!(text.contains("From 192.0.2.1") && text.contains("mtu = 1400"), "{text}");
    stream.finish_complete();

    net.ip("link delete eth1");
    eventually("eth1 is known to be gone", || (mode() == "none").then_some(()));
    net.connect_right();
    eventually("workers serve it again", || (mode() == "user").then_some(()));
    eventually("the neighbour resolves", || net.ping(&net.left, RIGHT).then_some(()));
    let stream = Stream::start(&net, RIGHT);
    workers_forward(&net, 100);
    stream.finish_complete();
}

#[test]
fn what_cannot_be_is_refused_and_nothing_changes() {
    let net = Net::new();
    net.ip("link add eth2 numtxqueues 17 numrxqueues 17 type veth peer name far2 numtxqueues 17 numrxqueues 17");
    let clean = net.traces();
    let [failure, usage] = [1, 2];
    let cases: [(&[&str], i32, &[&str]); 8] = [
        (&["--engine", "user", "--cores", "4096", "eth0"], failure, &["no core 4096", "may use 0"]),
        (&["--engine", "user", "--cores", "0,0", "eth0"], failure, &["core 0 was named twice"]),
        (&["--engine", "user", "--cores", "", "eth0"], usage, &["--cores", "2-5,7"]),
        (&["--engine", "user", "--cores", "3-2", "eth0"], usage, &["--cores", "ends before it begins"]),
        (&["--engine", "xdp", "--cores", "0", "eth0"], usage, &["--cores", "--engine user"]),
        (&["--engine", "usr", "eth0"], usage, &["--engine", "user"]),
        (&["--engine", "user", "--generic", "eth0"], usage, &["--engine user", "--generic"]),
        (
            &["--engine", "user", "eth0", "eth2"],
            failure,
            &["eth2", "17 receive queues", "ethtool -L eth2", "--engine xdp"],
        ),
    ];
    for (arguments, status, words) in cases {
        net.up_refused(arguments, status, words);
    }
    // Only one core is allowed, and it is another one.
    let mut command = net.router.command("taskset");
    command.args(["-c", "0", env!("CARGO_BIN_EXE_towpath"), "up", "--engine", "user", "--cores", "1", "eth0"]);
    let message = String::from_utf8_lossy(&command.output().expect("run").stderr).into_owned();
    assert!(message.contains("no core 1") && message.contains("may use 0 "), "{message}");
    assert_eq!(net.traces(), clean);
}

/// Has the kernel answer this process and its children as one without AF_XDP does.
fn without_af_xdp() -> std::io::Result<()> {
    const ALLOW: u32 = 0x7fff_0000;
    const REFUSE: u32 = 0x0005_0000 | libc::EAFNOSUPPORT as u32;
    const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    // struct seccomp_data: the system call's number, then, behind 12 other bytes, its arguments
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let mut filter = [
        step(LOAD, 0, 0, 0),
        step(EQUAL, 0, 3, libc::SYS_socket as u32),
        step(LOAD, 0, 0, 16),
        step(EQUAL, 0, 1, libc::AF_XDP as u32),
        step(RETURN, 0, 0, REFUSE),
        step(RETURN, 0, 0, ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: the program lives across the call and is as long as it says.
    let done =
        unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER as libc::c_ulong, &raw const program) };
    if done == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

#[test]
fn a_kernel_without_af_xdp_is_named_with_the_other_engine() {
    let net = Net::new();
    let clean = net.traces();
    let mut command = net.router.command(env!("CARGO_BIN_EXE_towpath"));
    command.arg("up").args(UP);
    // SAFETY: the filter is made of plain values, and nothing is allocated or locked on the way.
    unsafe { command.pre_exec(without_af_xdp) };
    let output = command.output().expect("run");
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains("CONFIG_XDP_SOCKETS") && message.contains("--engine xdp"), "{message}");
    assert_eq!(net.traces(), clean);
}
