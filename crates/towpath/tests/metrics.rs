//! The metrics endpoint: what it says is read by Prometheus's own parser, and agrees with the read commands.

mod common;

use common::{DEADLINE, Net, RIGHT, Stream, eventually};
use serde_json::Value;
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};

const URL: &str = "http://127.0.0.1:9475/metrics";
const ADDRESS: &str = "127.0.0.1:9475";

/// Samples, as the parser gives them: name, labels, value; and each metric's name and type.
struct Metrics {
    samples: Vec<Value>,
    metrics: Vec<Value>,
}

impl Metrics {
    /// Scrapes and parses.
    fn scrape(net: &Net) -> Self {
        Self::parse(net, &net.exec(&format!("curl -sSf -m 10 {URL}")))
    }

    fn parse(net: &Net, text: &str) -> Self {
        const PARSER: &str = "import json, sys\n\
            from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse\n\
            families = list(parse(sys.stdin.read()))\n\
            json.dump({'metrics': [[f.name, f.type, f.unit] for f in families], \
                'samples': [[s.name, s.labels, s.value] for f in families for s in f.samples]}, sys.stdout)";
        // The distribution's, which has the distribution's modules.
        let mut command = net.router.command("/usr/bin/python3");
        command.args(["-c", PARSER]).stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
        let mut python = command.stderr(std::process::Stdio::piped()).spawn().expect("python3");
        python.stdin.take().expect("stdin").write_all(text.as_bytes()).expect("written");
        let output = python.wait_with_output().expect("an end");
        assert!(output.status.success(), "{}\n{text}", String::from_utf8_lossy(&output.stderr));
        let mut said: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let mut take = |name: &str| serde_json::from_value(said[name].take()).expect(name);
        Self { samples: take("samples"), metrics: take("metrics") }
    }

    /// The only sample of this name with these labels (and perhaps others).
    fn value(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let is = |sample: &&Value| sample[0] == name && labels.iter().all(|(key, value)| sample[1][key] == *value);
        let found: Vec<_> = self.samples.iter().filter(is).collect();
        assert_eq!(found.len(), 1, "{name} {labels:?}: {found:?}");
        found[0][2].as_f64().expect("a number")
    }

    fn names(&self) -> BTreeSet<&str> {
        self.samples.iter().map(|sample| sample[0].as_str().expect("a name")).collect()
    }
}

#[test]
fn metrics_say_what_the_read_commands_say() {
    let net = Net::new();
    let daemon = net.up(&["--metrics", "eth0", "eth1"]);
    assert!(net.left.run(["curl", "-sS", "-m", "5", "http://192.0.2.1:9475/metrics"]).is_err(), "on loopback only");
    let stream = Stream::start(&net, RIGHT);
    net.flows(100);
    stream.finish_complete();
    net.exec("nft add table ip t { chain c { type filter hook forward priority 0; udp dport 9 drop; }; }");
    eventually("the rule is seen", || (!net.json(&["status"])["policies"].as_array()?.is_empty()).then_some(()));

    let (metrics, status, stats, exceptions) = eventually("nothing counts meanwhile", || {
        let before = net.json(&["show", "exceptions"]);
        let metrics = Metrics::scrape(&net);
        let (stats, exceptions) = (net.json(&["show", "stats"]), net.json(&["show", "exceptions"]));
        (before == exceptions).then(|| (metrics, net.json(&["status"]), stats, exceptions))
    });
    let (engine, pid) = (("engine", "xdp"), daemon.pid());
    assert_eq!(status["pid"], pid);
    assert_eq!(metrics.value("towpath_build_info", &[("version", env!("CARGO_PKG_VERSION")), engine]), 1.0);
    assert_eq!(Some(metrics.value("towpath_start_time_seconds", &[])), status["since"].as_f64());
    assert_eq!(metrics.value("towpath_in_sync", &[]), 1.0);
    assert_eq!(metrics.value("towpath_resyncs_total", &[]), 0.0);
    for family in ["ipv4", "ipv6"] {
        assert_eq!(Some(metrics.value("towpath_routes", &[("family", family)])), status["routes"][family].as_f64());
    }
    let labels = [("source", "nftables"), ("reason", "policy-netfilter")];
    assert_eq!(metrics.value("towpath_policies", &labels), 1.0);
    for row in stats["ports"].as_array().expect("ports") {
        let port = [("port", row["port"].as_str().expect("a name"))];
        for (name, field) in [
            ("towpath_port_received_packets_total", "rx_packets"),
            ("towpath_port_received_bytes_total", "rx_bytes"),
            ("towpath_port_transmitted_packets_total", "tx_packets"),
            ("towpath_port_transmitted_bytes_total", "tx_bytes"),
        ] {
            assert_eq!(Some(metrics.value(name, &port)), row[field].as_f64(), "{name}, {row}");
        }
        assert_eq!(metrics.value("towpath_port_ready", &[port[0], ("mode", "native")]), 1.0);
    }
    assert!(metrics.value("towpath_port_received_packets_total", &[("port", "eth0")]) >= 100.0);
    let mut counted = 0.0;
    for row in exceptions["exceptions"].as_array().expect("exceptions") {
        let labels = ["port", "reason"].map(|label| (label, row[label].as_str().expect("text")));
        let value = metrics.value("towpath_port_exceptions_total", &labels);
        assert_eq!(Some(value), row["packets"].as_f64(), "{row}");
        counted += value;
    }
    assert!(counted > 0.0, "pings went to Linux");
    for row in status["tables"].as_array().expect("tables") {
        let table = [("table", row["name"].as_str().expect("a name"))];
        for (name, field) in [
            ("towpath_table_capacity", "capacity"),
            ("towpath_table_memory_bytes", "memory_bytes"),
            ("towpath_table_used", "used"),
        ] {
            assert_eq!(Some(metrics.value(name, &table)), row[field].as_f64(), "{name}, {row}");
        }
    }
    assert_eq!(Some(metrics.value("towpath_flows_capacity", &[])), status["flows"]["capacity"].as_f64());
    assert_eq!(metrics.value("towpath_flow_gate", &[("state", "shut")]), 1.0);
    assert_eq!(metrics.value("towpath_flows", &[("state", "fast")]), 0.0);

    let kinds: BTreeSet<_> = metrics.metrics.iter().map(|metric| metric[1].as_str().expect("a type")).collect();
    assert_eq!(kinds, ["counter", "gauge", "info"].into(), "{:?}", metrics.metrics);
    board_asks_only_for(&metrics);
}

/// The board for Grafana names no metric that is not there. Those of workers are of the other engine, but told all the same,
/// without samples.
fn board_asks_only_for(metrics: &Metrics) {
    let board: Value = serde_json::from_str(include_str!("../../../dist/grafana.json")).expect("JSON");
    let total = |metric: &Value| format!("{}_total", metric[0].as_str().expect("a name"));
    let mut there: BTreeSet<String> = metrics.names().into_iter().map(str::to_owned).collect();
    there.extend(metrics.metrics.iter().filter(|metric| metric[1] == "counter").map(total));
    let panels = board["panels"].as_array().expect("panels");
    let asked =
        panels.iter().flat_map(|panel| panel["targets"].as_array().expect("targets")).map(|target| &target["expr"]);
    let words = asked.flat_map(|expr| expr.as_str().expect("text").split(|c: char| !c.is_alphanumeric() && c != '_'));
    let names: BTreeSet<_> = words.filter(|word| word.starts_with("towpath_")).collect();
    assert!(names.len() > 10, "{names:?}");
    let unknown: Vec<_> = names.iter().filter(|name| !there.contains(**name)).collect();
    assert!(unknown.is_empty(), "the board names {unknown:?}");
}

fn connect(net: &Net) -> TcpStream {
    let stream = net.router.enter(|| TcpStream::connect(ADDRESS)).expect("in the router").expect("connected");
    stream.set_read_timeout(Some(DEADLINE)).expect("timeout");
    stream
}

#[test]
fn clients_that_are_slow_or_send_garbage_harm_nobody() {
    let net = Net::new();
    let _daemon = net.up(&["--metrics", "eth0", "eth1"]);
    let talk = |bytes: &[u8]| {
        let mut stream = connect(&net);
        // The server hangs up before it has all of what is too long.
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(Shutdown::Write);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    };
    assert!(talk(b"\xff\x00\x01\r\n\r\n").starts_with("HTTP/1.1 400 "));
    assert!(talk(b"GET /metrics HTTP/1.1\r\n").starts_with("HTTP/1.1 400 "), "no end");
    assert!(talk(b"DELETE /metrics HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 405 "));
    assert!(talk(b"GET /other HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 404 "));
    assert_eq!(talk(b""), talk(b"GARBAGE\r\n\r\n"));
    talk(&vec![b'x'; 1 << 20]);

    // More than are served at once, which send a byte now and then or nothing: they are turned away in time.
    let mut slow: Vec<_> = (0..12).map(|_| connect(&net)).collect();
    slow.iter_mut().for_each(|stream| drop(stream.write_all(b"GET /metr")));
    assert!(net.json(&["status"])["in_sync"].as_bool().expect("in_sync"), "the daemon answers");
    let stream = Stream::start(&net, RIGHT);
    net.flows(100);
    eventually("the slow ones are turned away", || {
        slow.iter_mut().for_each(|stream| drop(stream.write(b"i")));
        net.router.run(["curl", "-sSf", "-m", "5", URL]).ok()
    });
    stream.finish_complete();
    assert_eq!(Metrics::scrape(&net).value("towpath_in_sync", &[]), 1.0);
}

#[test]
fn an_address_that_is_taken_is_refused() {
    let net = Net::new();
    let taken = net.router.enter(|| TcpListener::bind(ADDRESS)).expect("in the router").expect("bound");
    net.up_refused(&["--metrics", "eth0", "eth1"], 1, &[ADDRESS, "in use", "--metrics=ADDR:PORT"]);
    net.up_refused(&["--metrics=203.0.113.7:1", "eth0"], 1, &["203.0.113.7:1", "Cannot assign requested address"]);
    drop(taken);
    let mut daemon = net.up(&["--metrics=[::1]:9476", "eth0", "eth1"]);
    let text = net.exec("curl -sSf -m 10 http://[::1]:9476/metrics");
    assert_eq!(Metrics::parse(&net, &text).value("towpath_in_sync", &[]), 1.0);
    assert!(daemon.signal(libc::SIGTERM).success());
}

#[test]
fn a_resync_is_counted() {
    let net = Net::new();
    let mut fpm = net.start(net.with_only("-all,+bpf,+net_admin,+perfmon", &["fpm", "--metrics", "eth0", "eth1"]));
    let start_cm = || net.start(net.with_only("-all,+net_admin,+sys_admin", &["cm"]));
    let mut cm = start_cm();
    fpm.await_log("ready: 2 ports, ");
    let resyncs = || Metrics::scrape(&net).value("towpath_resyncs_total", &[]);
    assert_eq!(resyncs(), 0.0);
    cm.signal(libc::SIGKILL);
    eventually("the loss is seen", || (Metrics::scrape(&net).value("towpath_in_sync", &[]) == 0.0).then_some(()));
    let _cm = start_cm();
    eventually("in sync again", || (Metrics::scrape(&net).value("towpath_in_sync", &[]) == 1.0).then_some(()));
    assert_eq!(resyncs(), 1.0);
    let by_cause = |cause| Metrics::scrape(&net).value("towpath_resyncs_by_cause_total", &[("cause", cause)]);
    assert_eq!(["cache-manager", "routes", "nftables"].map(by_cause), [1.0, 0.0, 0.0]);
    let text = String::from_utf8(net.towpath(&["status"]).stdout).expect("text");
    assert!(text.contains("read again since the start, by cause: cache-manager 1\n"), "{text}");
}
