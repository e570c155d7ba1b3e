//! Bad input: a clear message, exit status 1 (2 for wrong usage), and nothing changed.

mod common;

use common::{Net, RIGHT, Stream, eventually};
use std::process::Command;

/// `arguments` fail with all of `words` in the message, and leave no trace.
fn refuses(net: &Net, arguments: &[&str], words: &[&str]) {
    let before = net.traces();
    let message = net.refused(arguments);
    for word in words {
        assert!(message.contains(word), "{word:?} is missing in: {message}");
    }
    assert_eq!(net.traces(), before, "nothing changed");
    assert!(net.ping(&net.left, RIGHT), "Linux goes on");
}

#[test]
fn unknown_ports_are_named_with_their_nearest() {
    let net = Net::new();
    refuses(&net, &["up", "eth0", "eht1"], &["eht1", "did you mean", "eth1"]);
}

#[test]
fn interfaces_that_cannot_be_ports_are_named() {
    let net = Net::new();
    net.ip("link add br0 type bridge");
    net.ip("link add mac0 link eth1 type macvlan");
    refuses(&net, &["up", "eth0", "br0"], &["br0", "driver"]);
    refuses(&net, &["up", "--generic", "br0"], &["br0", "driver"]);
    refuses(&net, &["up", "mac0"], &["mac0", "driver"]);
    refuses(&net, &["up", "lo"], &["lo", "this host"]);
}

/// A veth whose driver refuses native XDP: its peer has more transmit queues than it has receive queues.
fn add_without_native(net: &Net) {
    net.ip("link add eth2 numtxqueues 1 numrxqueues 1 type veth peer name far2 numtxqueues 4 numrxqueues 4");
    net.ip("link set eth2 up");
}

#[test]
fn a_port_without_native_xdp_is_refused_with_the_remedies() {
    let net = Net::new();
    add_without_native(&net);
    refuses(&net, &["up", "eth0", "eth2", "eth1"], &["eth2", "veth", "ethtool -L", "--generic"]);
    let _daemon = net.up(&["--generic", "eth0", "eth2", "eth1"]);
    assert!(net.ip("-d link show eth2").contains("xdpgeneric"));
}

#[test]
fn without_names_what_cannot_be_a_port_is_left_out_with_a_reason() {
    let net = Net::new();
    add_without_native(&net);
    net.ip("link delete eth0");
    net.connect_left();
    net.ip("link add br0 type bridge");
    net.ip("link add eth3 type veth peer name far3");
    let _foreign = net.attach_foreign_program("eth3");
    let mut daemon = net.up(&[]);
    let log = daemon.log();
    for (port, why) in [("lo", "this host"), ("br0", "driver"), ("eth2", "ethtool -L"), ("eth3", "XDP program")] {
        let said = log.lines().any(|line| line.contains(&format!("left out: {port}: ")) && line.contains(why));
        assert!(said, "{port}, {why}: {log}");
    }
    let ports = net.json(&["show", "ports"]);
    let mut names: Vec<_> =
        ports["ports"].as_array().unwrap().iter().map(|port| port["name"].as_str().unwrap()).collect();
    names.sort_unstable();
    assert_eq!(names, ["eth0", "eth1", "far2", "far3"]);
    assert!(daemon.signal(libc::SIGTERM).success());
    assert!(net.ip("-d link show eth3").contains("xdp"), "left alone");
}

#[test]
fn a_foreign_xdp_program_is_left_alone() {
    let net = Net::new();
    let _foreign = net.attach_foreign_program("eth1");
    let before = net.ip("-d link show eth1");
    let id = before.split("prog/xdp id ").nth(1).and_then(|rest| rest.split_whitespace().next()).expect("a program");
    refuses(&net, &["up", "eth0", "eth1"], &["eth1", "XDP", &format!("id {id}")]);
    assert_eq!(net.ip("-d link show eth1"), before);
}

#[test]
fn a_second_daemon_is_told_of_the_first() {
    let net = Net::new();
    let daemon = net.up(&["eth0", "eth1"]);
    refuses(&net, &["up", "eth0"], &["already", &format!("pid {}", daemon.pid())]);
    assert!(net.json(&["status"])["in_sync"].as_bool().unwrap());
}

const TOWPATH: &str = env!("CARGO_BIN_EXE_towpath");

/// The capabilities without which nothing works.
const CAPABILITIES: [&str; 3] = ["bpf", "net_admin", "perfmon"];

/// As setpriv writes it: only these.
fn only<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    names.into_iter().fold("-all".into(), |all, name| format!("{all},+{name}"))
}

/// A command fails with all of `words` in its message, and leaves no trace.
fn refuses_command(net: &Net, mut command: Command, words: &[&str]) {
    let before = net.traces();
    let output = command.output().expect("run");
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{message}");
    for word in words {
        assert!(message.contains(word), "{word:?} is missing in: {message}");
    }
    assert_eq!(net.traces(), before, "nothing changed");
}

#[test]
fn missing_privileges_are_named() {
    let net = Net::new();
    for missing in CAPABILITIES {
        let others = only(CAPABILITIES.into_iter().filter(|name| *name != missing));
        let command = net.with_only(&others, &["up", "eth0", "eth1"]);
        refuses_command(&net, command, &[&format!("CAP_{}", missing.to_uppercase())]);
    }
}

/// Where the kernel lists netfilter's hooks, or has no BPF programs there (before 6.4), nothing else is needed; where
/// it does not, BPF links must be listed, for which the kernel asks CAP_SYS_ADMIN.
#[test]
fn three_capabilities_are_enough_where_netfilter_hooks_can_be_known() {
    let net = Net::new();
    let mut daemon = net.start(net.with_only(&only(CAPABILITIES), &["up", "eth0", "eth1"]));
    let ready = eventually("an answer", || {
        let log = daemon.log();
        if log.contains("ready: ") { Some(true) } else { log.contains("towpath: ").then_some(false) }
    });
    println!("netfilter's hooks can be known: {ready}");
    if ready {
        let stream = Stream::start(&net, RIGHT);
        net.flows(100);
        assert!(daemon.signal(libc::SIGTERM).success());
        stream.finish_complete();
    } else {
        assert_eq!(daemon.wait().code(), Some(1));
        let log = daemon.log();
        assert!(log.contains("CAP_SYS_ADMIN") && log.contains("CONFIG_NETFILTER_NETLINK_HOOK"), "{log}");
    }
    assert_eq!(net.traces(), "[], 0 pins");
}

/// A command that runs in the router as process 1 of a machine of its own, as far as mounts and processes go.
fn isolated(net: &Net, words: &[&str]) -> Command {
    let mut command = net.router.command("unshare");
    command.args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]).args(words);
    command
}

#[test]
fn a_bpffs_is_mounted_where_there_is_none() {
    let net = Net::new();
    let none = isolated(&net, &["grep", "-q", " bpf ", "/proc/mounts"]).status().expect("run");
    assert_eq!(none.code(), Some(1), "there is no bpffs to begin with");
    let mut daemon = net.start(isolated(&net, &[TOWPATH, "up", "eth0", "eth1"]));
    daemon.await_log("ready: ");
    let pid = daemon.pid();
    let child = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    let mounts = std::fs::read_to_string(format!("/proc/{}/mounts", child.trim())).unwrap();
    assert!(mounts.lines().any(|line| line.starts_with("bpf /sys/fs/bpf bpf ")), "{mounts}");
    let stream = Stream::start(&net, RIGHT);
    net.flows(100);
    assert!(net.towpath(&["status"]).status.success());
    daemon.signal(libc::SIGKILL);
    eventually("its programs go with its mounts", || (net.traces() == "[], 0 pins").then_some(()));
    stream.finish_complete();
}

#[test]
fn how_to_mount_a_bpffs_is_said_where_we_may_not() {
    let net = Net::new();
    let command = isolated(&net, &["setpriv", "--bounding-set=-sys_admin", TOWPATH, "up", "eth0", "eth1"]);
    refuses_command(&net, command, &["BPF file system", "CAP_SYS_ADMIN", "mount -t bpf bpf /sys/fs/bpf"]);
}

/// Interfaces whose slots of the table of ports are the same four.
const CROWD: [&str; 5] = ["c0", "c1", "c2", "c3", "c4"];

fn add_crowd(net: &Net) {
    for (name, index) in CROWD.iter().zip((600..).step_by(256)) {
        net.ip(&format!("link add {name} index {index} type veth peer name far-{name}"));
    }
}

#[test]
fn ports_that_the_table_has_no_room_for_are_named() {
    let net = Net::new();
    add_crowd(&net);
    let words = ["c4 (index 1624)", "table ports is full", "leave one of those out"];
    refuses(&net, &[&["up", "eth0", "eth1"], &CROWD[..]].concat(), &words);
    let daemon = net.up(&[]);
    let log = daemon.log();
    assert!(log.lines().any(|line| line.contains("left out: c") && line.contains("table ports is full")), "{log}");
    let stream = Stream::start(&net, RIGHT);
    net.flows(100);
    stream.finish_complete();
}

#[test]
fn a_port_that_comes_back_waits_for_room_and_gets_it() {
    let net = Net::new();
    add_crowd(&net);
    let _daemon = net.up(&["eth0", "eth1", "c0", "c1", "c2", "c3"]);
    let notice = || {
        let status = net.json(&["status"]);
        let notices = status["notices"].as_array().expect("notices").iter();
        notices.filter_map(|notice| notice.as_str()).find(|notice| notice.contains("table ports")).map(str::to_string)
    };
    assert_eq!(notice(), None);
    net.ip("link delete eth1");
    net.ip("link delete c4");
    net.connect_right_by_index(1624);
    let notice_now = eventually("the status says so", notice);
    for word in ["1 ports wait", "serve fewer ports", "goes to Linux"] {
        assert!(notice_now.contains(word), "{word:?} is missing in: {notice_now}");
    }
    assert!(!net.ip("-d link show eth1").contains("xdp"));
    eventually("Linux forwards", || net.ping(&net.left, RIGHT).then_some(()));
    // It goes without its peer, so that nothing more is heard of ports: it is the waiting one that is tried again.
    net.ip(&format!("link set c0 netns {}", net.left.netns()));
    eventually("there is room", || notice().is_none().then_some(()));
    eventually("the program is attached", || net.ip("-d link show eth1").contains("xdp").then_some(()));
    let stream = Stream::start(&net, RIGHT);
    net.flows(100);
    stream.finish_complete();
}

#[test]
fn the_user_engine_names_the_privilege_for_its_sockets() {
    let net = Net::new();
    let command = net.with_only(&only(CAPABILITIES), &["up", "--engine", "user", "eth0", "eth1"]);
    refuses_command(&net, command, &["AF_XDP", "CAP_NET_RAW"]);
}

#[test]
fn read_commands_without_a_daemon_say_so() {
    let net = Net::new();
    let all: [&[&str]; 4] =
        [&["status"], &["show", "routes"], &["show", "stats", "--json"], &["explain", "192.0.2.2", RIGHT]];
    for arguments in all {
        refuses(&net, arguments, &["no towpath runs", "towpath up"]);
    }
}

#[test]
fn down_with_nothing_there_is_no_failure() {
    let net = Net::new();
    assert!(net.towpath(&["down"]).status.success());
}

#[test]
fn wrong_usage_has_status_two() {
    let net = Net::new();
    let all: [&[&str]; 5] = [
        &[],
        &["sideways"],
        &["up", "--engine", "steam"],
        &["explain", "192.0.2.1", "2001:db8::1"],
        &["explain", "192.0.2.1", "192.0.2.2", "out", "eth0"],
    ];
    for arguments in all {
        let output = net.towpath(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(output.stdout.is_empty() && !output.stderr.is_empty(), "{arguments:?}");
    }
}

/// A folder for files of a test, which goes with it.
struct Folder(std::path::PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("towpath-{name}-{}", std::process::id()));
        std::fs::create_dir(&path).expect("a folder");
        Self(path)
    }

    /// Writes a file and gives its path.
    fn file(&self, name: &str, content: &[u8]) -> String {
        let path = self.0.join(name);
        std::fs::write(&path, content).expect("written");
        path.to_str().expect("UTF-8").into()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn a_wrong_configuration_is_named_with_its_place() {
    let net = Net::new();
    let folder = Folder::new("wrong-configuration");
    let there = folder.0.to_str().expect("UTF-8");
    for (content, words) in [
        (
            &b"# ports of the router\nport = [\"eth0\"]\n"[..],
            &[".toml:2:1: ", "unknown key \"port\"", "did you mean ports?"][..],
        ),
        (b"ports = [\"eth0\", \"eth1\"]\nmax-flows = \"many\"\n", &[".toml:2:13: ", "max-flows", "a number"]),
        (b"ports = [\"eth0\", \"eth1\"]\nengine = \"steam\"\n", &[".toml:2:10: ", "steam", "xdp, user, auto"]),
        (b"ports = [\"eth0\", \"eth", &[".toml:1:", "no TOML"]),
        (b"\x7fELF\x02\x01\x01\xff", &[".toml:1:", "UTF-8"]),
        (b"engine = \"xdp\"\ncores = \"1\"\n", &["--engine user", "cores 1 (line 2)"]),
    ] {
        let file = folder.file("wrong.toml", content);
        net.up_refused(&["--config", &file], 2, words);
    }
    net.up_refused(&["--config", there], 2, &[there, "directory"]);
    net.up_refused(&["--config", "/none/such.toml"], 2, &["/none/such.toml", "No such file"]);
    net.up_refused(&["--config", "/dev/zero"], 2, &["/dev/zero", "more than"]);
    assert!(net.ping(&net.left, RIGHT), "Linux goes on");
}

#[test]
fn a_configuration_that_may_not_be_read_is_named() {
    let net = Net::new();
    let folder = Folder::new("secret-configuration");
    let file = folder.file("secret.toml", b"ports = [\"eth0\"]\n");
    std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o000)).expect("permissions");
    let output = net.with_only(&only(CAPABILITIES), &["up", "--config", &file]).output().expect("run");
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(message.contains(&file) && message.contains("Permission denied"), "{message}");
}

#[test]
fn a_configuration_is_followed_and_the_command_line_goes_before() {
    let net = Net::new();
    let folder = Folder::new("configuration");
    let file = folder.file("good.toml", b"ports = [\"eth0\", \"eth1\"]\nflows = \"established\"\ngeneric = true\n");
    let ports = || {
        let ports = net.json(&["show", "ports"]);
        ports["ports"].as_array().expect("ports").iter().map(|port| port["name"].clone()).collect::<Vec<_>>()
    };
    let mut daemon = net.up(&["--config", &file]);
    let said = [&file, "ports eth0 eth1 (line 1)", "flows established (line 2)", "engine auto (default)"];
    let log = daemon.log();
    assert!(log.lines().any(|line| said.iter().all(|word| line.contains(word))), "{log}");
    assert_eq!(ports(), ["eth0", "eth1"]);
    assert!(net.ip("-d link show eth1").contains("xdpgeneric"));
    assert!(daemon.signal(libc::SIGTERM).success());
    let daemon = net.up(&["--config", &file, "--generic=false", "eth1"]);
    assert!(daemon.log().contains("ports eth1 (command line)"), "{}", daemon.log());
    assert_eq!(ports(), ["eth1"]);
    assert!(!net.ip("-d link show eth1").contains("xdpgeneric"));
}

#[test]
fn the_journal_gets_priorities_and_no_times() {
    use std::os::unix::fs::MetadataExt;
    let net = Net::new();
    let folder = Folder::new("journal");
    let file = folder.file("settings.toml", b"ports = [\"eth7\"]\n");
    let log = folder.file("log", b"");
    let said = |stream: &str| {
        let stderr = std::fs::File::create(&log).expect("a log");
        let mut command = net.router.command(TOWPATH);
        command.args(["up", "--config", &file]).env("JOURNAL_STREAM", stream).env_remove("RUST_LOG").stderr(stderr);
        assert_eq!(command.status().expect("run").code(), Some(1));
        std::fs::read_to_string(&log).expect("a log")
    };
    let metadata = std::fs::metadata(&log).expect("a log");
    let journal = said(&format!("{}:{}", metadata.dev(), metadata.ino()));
    let lines: Vec<_> = journal.lines().collect();
    assert!(lines[0].starts_with("<6>settings with "), "{journal}");
    assert!(lines[1].starts_with("<3>no interface \"eth7\"") && lines.len() == 2, "{journal}");
    let elsewhere = said("1:1");
    assert!(elsewhere.contains(" INFO settings with ") && elsewhere.contains("\ntowpath: no interface"), "{elsewhere}");
}

#[test]
fn a_bad_client_does_no_harm() {
    use std::io::{Read, Write};
    let net = Net::new();
    let _daemon = net.up(&["eth0", "eth1"]);
    let path = format!("/run/towpath/{}/control.sock", net.inode());
    let mut stream = std::os::unix::net::UnixStream::connect(path).unwrap();
    stream.write_all(b"{\"request\":\"explain\",\"source\":\"x\"}\n").unwrap();
    let mut reply = [0; 10];
    stream.read_exact(&mut reply).unwrap();
    assert_eq!(&reply, b"{\"error\":\"");
    assert!(net.json(&["status"])["in_sync"].as_bool().unwrap());
}
