//! Lost notifications: Linux tells each listener more than there is room for, while CM waits for its receiver. The loss is
//! counted, and what CM told in the end is what there is.

mod support;

use std::collections::BTreeSet;
use std::io::Write;
use std::process::{Command, Stdio};
use support::{Running, in_namespace, ip, wait};
use towpath_cm::guard::{Nftables, Rules, Tc, Xfrm, watchers};
use towpath_cm::{FlowMode, Options, PortIndex, Watcher};
use towpath_fpc::{Listener, PolicySource, Scope};

/// Gives a program these lines, all of which must be to its taste.
fn feed(program: &[&str], lines: &str) {
    let mut child = Command::new(program[0]).args(&program[1..]).stdin(Stdio::piped()).spawn().expect(program[0]);
    child.stdin.take().expect("stdin").write_all(lines.as_bytes()).expect("taken");
    assert!(child.wait().expect("an end").success(), "{program:?}");
}

fn topology() {
    ip("link add v0 type veth peer name v1");
    ip("link set v0 up");
    ip("link set v1 up");
    ip("address add 192.0.2.1/24 dev v0");
}

fn start() -> Running {
    let options = Options { receive_buffer: 4096, ..Options::default() };
    Running::with(options, || watchers(FlowMode::Flowtable).expect("watchers"))
}

/// Has CM wait while this is done, and then find out that there was too much.
fn overrun(cm: &Running, listener: Listener, flood: impl FnOnce()) {
    let before = cm.receiver.lock().expect("lock").lost.get(&listener).copied();
    let blocked = cm.receiver.lock().expect("lock");
    flood();
    drop(blocked);
    wait("the loss to be counted", || {
        let count = cm.receiver.lock().expect("lock").lost.get(&listener).copied();
        (count > before).then_some(())
    });
}

/// Waits until the policies that CM told are those which a watcher finds that was made now.
fn policies_are_found(cm: &Running, watcher: impl Watcher) {
    let mut watcher: Box<dyn Watcher> = Box::new(watcher);
    let mut ports = PortIndex::default();
    cm.model().ports.into_values().for_each(|port| drop(ports.insert(port)));
    let found: BTreeSet<_> =
        watcher.findings(&ports).expect("findings").into_iter().map(|f| (f.scope, f.rules)).collect();
    assert!(!found.is_empty(), "what was done last stands in the way");
    let source = watcher.source();
    cm.wait("all policies to be told", |model| {
        let told: BTreeSet<(Scope, _)> =
            model.policies.get(&source)?.iter().map(|policy| (policy.scope, policy.rules.clone())).collect();
        (told == found).then_some(())
    });
}

#[test]
fn of_interfaces() {
    in_namespace(|| {
        topology();
        let cm = start();
        let mtus: String = (0..500).map(|i| format!("link set v0 mtu {}\n", 1400 + i % 2)).collect();
        overrun(&cm, Listener::Interfaces, || feed(&["ip", "-batch", "-"], &(mtus + "link set v0 mtu 1300\n")));
        cm.wait("the last change", |model| {
            model.ports.values().find(|port| port.name == "v0" && port.mtu == 1300).cloned()
        });
    });
}

#[test]
fn of_nftables() {
    in_namespace(|| {
        topology();
        let cm = start();
        let rules = "add rule inet t other counter\n".repeat(4000);
        let lines = format!(
            "add table inet t\nadd chain inet t other\n{rules}\
             add chain inet t c {{ type filter hook forward priority 0; policy drop; }}\n"
        );
        overrun(&cm, Listener::Policies(PolicySource::Nftables), || feed(&["nft", "-f", "-"], &lines));
        policies_are_found(&cm, Nftables::new(FlowMode::Flowtable).expect("a watcher"));
    });
}

#[test]
fn of_rules() {
    in_namespace(|| {
        topology();
        let cm = start();
        let lines: String =
            (0..2000).map(|i| format!("rule add from 10.{}.{}.0/24 lookup 100\n", i / 250, i % 250)).collect();
        overrun(&cm, Listener::Policies(PolicySource::Rules), || feed(&["ip", "-batch", "-"], &lines));
        policies_are_found(&cm, Rules::new().expect("a watcher"));
    });
}

#[test]
fn of_traffic_control() {
    in_namespace(|| {
        topology();
        let cm = start();
        // The first is told, and so CM waits; its words are taken apart at blanks, but for quotation marks.
        let filter = |port| {
            format!(
                "qdisc add dev {port} clsact\n\
                 filter add dev {port} ingress bpf bytecode \"1,6 0 0 4294967295\" classid 1:1\n"
            )
        };
        let others = "qdisc add dev v1 clsact\nqdisc del dev v1 clsact\n".repeat(1000);
        let lines = filter("v0") + &others + &filter("v1");
        overrun(&cm, Listener::Policies(PolicySource::Tc), || feed(&["tc", "-batch", "-"], &lines));
        policies_are_found(&cm, Tc::new().expect("a watcher"));
    });
}

#[test]
fn of_ipsec() {
    in_namespace(|| {
        topology();
        let cm = start();
        let line = |i| {
            format!("xfrm policy add dir fwd src 10.{}.{}.0/24 dst 198.51.100.0/24 action block\n", i / 250, i % 250)
        };
        let lines: String = (0..2000).map(line).collect();
        overrun(&cm, Listener::Policies(PolicySource::Xfrm), || feed(&["ip", "-batch", "-"], &lines));
        policies_are_found(&cm, Xfrm::new().expect("a watcher"));
    });
}
