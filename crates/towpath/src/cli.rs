//! The command line: what may be asked for, and its help.

use crate::daemon::Origin;
use crate::link::Remote;
use crate::metrics;
use crate::wires::PortArgument;
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use towpath_cm::FlowMode;
use towpath_fpc::tls::{Identity, Name};

/// A fast path beside the Linux network stack.
///
/// Packets that Linux would only forward go from driver to driver; everything else, and everything that the fast path
/// cannot prove to be forwarded the same way, goes to Linux as it arrived. Configure Linux as always.
#[derive(Parser)]
#[command(name = "towpath", version, max_term_width = 100, after_help = EXIT_CODES)]
pub struct Cli {
    /// What to do
    #[command(subcommand)]
    pub command: Command,
    /// Log more to stderr: -v for details, -vv for everything (RUST_LOG overrides)
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    pub verbose: u8,
}

const EXIT_CODES: &str = "Exit status: 0 success, 1 failure (nothing was changed), 2 wrong usage or configuration, 75 a \
    daemon that was asked to leave.\n\
    Each network namespace has an instance of its own; run the command in the namespace it is about.";

/// The subcommands.
#[derive(Subcommand)]
pub enum Command {
    /// Serve ports in the foreground until Ctrl-C or `towpath down`
    Up(Up),
    /// Take the fast path off; Linux forwards again
    Down,
    /// End the daemon, and leave its programs to the next one: for an upgrade, or other options
    ///
    /// Packets go on by what was known, until the next `towpath up` takes the tables over; connections behind firewall rules or
    /// NAT are Linux's after 3 s. Workers of `--engine user` forward what they have before they end, so nothing is lost; by
    /// ports with wires of their own nothing comes in meanwhile. The daemon's exit status is 75.
    Leave,
    /// Say how the instance of this namespace is doing
    Status(Output),
    /// Show what the fast path holds
    #[command(subcommand)]
    Show(Show),
    /// Say what would happen to a packet, step by step, and why
    Explain(Explain),
    /// Compare the fast path's tables with Linux; exit status 1 if they differ
    ///
    /// Asks Linux for the route to the first and last address of every prefix, and compares way out, gateway and link-layer
    /// address with those in the tables; and whether each port has the program. What is left to Linux cannot differ. What
    /// changes meanwhile is asked for again.
    Check(Output),
    /// Say what this machine and its settings gain or cost the fast path; exit status 1 if something stops it
    ///
    /// Looks at the kernel, at the ports and at Linux's settings, whether a towpath runs or not, and changes nothing. Of what
    /// is not well it says what that costs, and a command that mends it or shows what stands in the way. The exit status is
    /// 0 if nothing stops the fast path: what only makes it slower, or keeps part of the traffic in Linux, does not count.
    /// Where no ports are named and none are served, those that no fast path could serve count only if all are such.
    Doctor(Doctor),
    /// Watch rates: by port, what goes to Linux and why, and prefixes; live on a terminal until q is pressed
    Top(Top),
    /// Show packets as they arrive, what becomes of each, and why
    ///
    /// Each packet is sent through the packet path once more, over the tables as they are a moment later, to say what it met. It
    /// is counted and marked only once. Ends on Ctrl-C, and says how many packets there were.
    Trace(Trace),
    /// Translate addresses at a port, without connection tracking
    #[command(subcommand)]
    Nat(Nat),
    /// Drop unwanted packets where they come in, before the fast path, Linux or tcpdump sees them
    #[command(subcommand)]
    Filter(crate::filter::Filter),
    /// Run the cache manager alone: read Linux's state and send it to a `towpath fpm`
    Cm(Cm),
    /// Run the fast path manager alone: as `up`, with Linux's state from a `towpath cm`
    Fpm(Fpm),
    /// Write manual pages, completions and an example of the configuration, for an installation
    #[command(hide = true)]
    Generate {
        /// Where to
        folder: PathBuf,
    },
}

/// `towpath up`
#[derive(Args, Clone)]
pub struct Up {
    /// As for `fpm`
    #[command(flatten)]
    pub serve: Serve,
    /// As for `cm`
    #[command(flatten)]
    pub follow: Follow,
    /// As for `cm` and `fpm`
    #[command(flatten)]
    pub settings: Settings,
}

/// How ports are served
#[derive(Args, Clone)]
pub struct Serve {
    /// Interfaces to serve; none: every interface that can be served. With --engine user, PORT=WIRE has
    /// frames come and go by something else: af_packet:NAME (an interface, by packet sockets), tap:NAME (a TAP),
    /// pcap:IN,OUT (files) or dpdk:DEVICE (a device of DPDK's). PORT is then a TAP with the port's settings
    pub ports: Vec<PortArgument>,
    /// What runs the packet path
    #[arg(long, value_enum, default_value_t = Engine::Auto)]
    pub engine: Engine,
    /// Cores for the workers of --engine user, as 2-5,7; default: some of those that this process may use, but not the
    /// first
    #[arg(long, value_name = "LIST")]
    pub cores: Option<Cores>,
    /// Use XDP's generic mode, on every port: slower, but no driver needs to know of it
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
        default_value_t = false, action = clap::ArgAction::Set)]
    pub generic: bool,
    /// Forward nothing: find out what would go fast and why the rest would not, while Linux carries all of it as before. Counts,
    /// rates, `explain` and `trace` say what would be
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
        default_value_t = false, action = clap::ArgAction::Set)]
    pub shadow: bool,
    /// Room for so many connections that Linux hands over; more stay in Linux, and are counted. 0: none is taken
    #[arg(long, value_name = "NUMBER", default_value_t = 65_536, value_parser = clap::value_parser!(u32).range(..=MAX_FLOWS))]
    pub max_flows: u32,
    /// Leave all packets to Linux when nobody has looked at Linux's settings for so many seconds, since towpath has died or is
    /// stopped, until one is there again; default: go on by what was last known. The time is asked for with every packet,
    /// which costs some 60 instructions. A port with a wire receives nothing once towpath has died, with or without this
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(DETACH_AFTER))]
    pub detach_after: Option<u32>,
    /// Serve OpenMetrics by HTTP at this address of the network namespace, path /metrics (as --metrics=127.0.0.1:9475, which is
    /// where --metrics alone has it)
    #[arg(long, value_name = "ADDR:PORT", num_args = 0..=1, require_equals = true, default_missing_value = metrics::DEFAULT)]
    pub metrics: Option<SocketAddr>,
}

/// Settings are looked at once a second, and a machine may be busy.
const DETACH_AFTER: std::ops::RangeInclusive<i64> = 3..=86_400;
const MAX_FLOWS: i64 = towpath_tables::backing::MAX_FLOWS as i64;

/// Settings kept in a file
#[derive(Args, Clone)]
pub struct Settings {
    /// Take settings from this TOML file: its keys are `ports` and the long options of `up`. What the command line says
    /// goes before
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// What is read of Linux's state
#[derive(Args, Clone, Copy)]
pub struct Follow {
    /// Connections that go fast once Linux has accepted them, where firewall rules or NAT are in the way: those that a
    /// rule put into a flowtable (flowtable), those with a connection mark (mark=VALUE/MASK), all that are established
    /// (established), or none
    #[arg(long, value_name = "WHICH", default_value_t = FlowMode::Flowtable)]
    pub flows: FlowMode,
}

/// Engines that can be asked for.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Engine {
    /// An XDP program in the driver
    Xdp,
    /// Workers on cores of their own in user space, with AF_XDP sockets
    User,
    /// The best that this build and machine have
    Auto,
}

/// Numbers of cores, in the order given.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Cores(pub Vec<u32>);

impl std::str::FromStr for Cores {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        /// No kernel knows more.
        const MOST: u32 = 8192;
        let number = |text: &str| match text.parse() {
            Ok(core) if core < MOST => Ok(core),
            _ => Err(format!("{text:?} is no number of a core; write cores as 2-5,7")),
        };
        let range = |text: &str| match text.split_once('-') {
            Some((first, last)) => match (number(first)?, number(last)?) {
                (first, last) if first <= last => Ok(first..=last),
                _ => Err(format!("{text:?} ends before it begins")),
            },
            None => number(text).map(|core| core..=core),
        };
        let ranges = text.split(',').map(range).collect::<Result<Vec<_>, _>>()?;
        Ok(Self(ranges.into_iter().flatten().collect()))
    }
}

/// How to print.
#[derive(Args, Clone, Copy)]
pub struct Output {
    /// Print JSON, as described in docs/json.md
    #[arg(long)]
    pub json: bool,
}

/// `towpath top`
#[derive(Args)]
pub struct Top {
    /// Print a block for each interval instead of the live view; so it is too where stdout is no terminal
    #[arg(short, long)]
    pub batch: bool,
    /// End after so many intervals; implies --batch
    #[arg(short = 'n', long, value_name = "NUMBER", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,
    /// Seconds of an interval, 0.1 to 3600
    #[arg(short, long, value_name = "SECONDS", default_value = "1")]
    pub delay: Seconds,
    /// Print a line of JSON for each interval, as described in docs/json.md; implies --batch
    #[arg(long)]
    pub json: bool,
    /// Tell the prefixes that most packets go to, too: estimates, from a sample drawn at random. Meanwhile the ports run the
    /// program for `towpath trace`, which draws it
    #[arg(short, long)]
    pub prefixes: bool,
}

/// A time that can be waited for between two looks.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Seconds(pub f64);

impl std::str::FromStr for Seconds {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse() {
            Ok(seconds) if (0.1..=3600.0).contains(&seconds) => Ok(Self(seconds)),
            _ => Err(format!("{text:?} is no number of seconds from 0.1 to 3600")),
        }
    }
}

/// `towpath trace`
#[derive(Args)]
pub struct Trace {
    /// Which packets, as for tcpdump (pcap-filter(7)): they are looked at as they arrive, with tags in the frame; none: all
    pub filter: Vec<String>,
    /// End after so many packets
    #[arg(short, long, value_name = "NUMBER", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,
    /// So many packets a second at most; more are counted
    #[arg(long, value_name = "NUMBER", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub rate: u32,
    /// Only packets that go to Linux
    #[arg(long)]
    pub exceptions: bool,
    /// Only packets that go to Linux for this reason, as `towpath show exceptions` names it
    #[arg(long, value_name = "NAME")]
    pub reason: Option<String>,
    /// Printing
    #[command(flatten)]
    pub output: Output,
}

/// `towpath doctor`
#[derive(Args)]
pub struct Doctor {
    /// Interfaces to look at; none: those that are served, or every one that could be
    pub ports: Vec<String>,
    /// Printing
    #[command(flatten)]
    pub output: Output,
}

/// `towpath show`
#[derive(Subcommand)]
pub enum Show {
    /// Ports and how they are served
    Ports(Output),
    /// Routes, and what the fast path does with each
    Routes(Routes),
    /// Neighbours
    #[command(alias = "neighbours")]
    Neighbors(Output),
    /// Next hops in use by routes
    Nexthops(Output),
    /// Packets handed to Linux, by port and reason
    Exceptions(Output),
    /// Packets and bytes forwarded by the fast path, by port
    Stats(Output),
    /// Connections that Linux hands over, direction by direction
    Flows(Output),
}

/// `towpath nat`
#[derive(Subcommand)]
pub enum Nat {
    /// Have addresses inside be others outside, beyond a port: sources of what leaves by it, destinations of what comes in;
    /// with --protocol, only a port of an address
    Add(NatMapping),
    /// End a mapping
    Del(NatMapping),
    /// Show the mappings, and what passed of each
    List(Output),
}

/// A mapping of addresses
#[derive(Args, Clone, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
pub struct NatMapping {
    /// The port beyond which the addresses are others
    #[arg(long)]
    pub port: String,
    /// Translate only a port of this protocol: INSIDE and OUTSIDE are ADDRESS:PORT, or [ADDRESS]:PORT for IPv6
    #[arg(long, value_enum)]
    pub protocol: Option<Protocol>,
    /// Address or prefix as the router and everything on this side of it has it
    pub inside: String,
    /// Address or prefix of the same length that it is outside
    pub outside: String,
}

/// `towpath show routes`
#[derive(Args)]
pub struct Routes {
    /// Only routes within this prefix or address
    pub within: Option<String>,
    /// Printing
    #[command(flatten)]
    pub output: Output,
}

/// `towpath explain`
#[derive(Args)]
pub struct Explain {
    /// Source address of the packet
    pub source: IpAddr,
    /// Destination address of the packet
    pub destination: IpAddr,
    /// The port it comes in by, as `in PORT`; without: the one by which Linux reaches the source
    #[arg(num_args = 0..=2, value_names = ["in", "PORT"])]
    pub ingress: Vec<String>,
    /// Transport protocol
    #[arg(long, value_enum, default_value_t = Protocol::Udp)]
    pub protocol: Protocol,
    /// Source port
    #[arg(long, default_value_t = 1024)]
    pub sport: u16,
    /// Destination port
    #[arg(long, default_value_t = 9)]
    pub dport: u16,
    /// Length of the IP packet in bytes, header included
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u16).range(60..))]
    pub length: u16,
    /// TTL or hop limit on arrival
    #[arg(long, default_value_t = 64)]
    pub ttl: u8,
    /// Printing
    #[command(flatten)]
    pub output: Output,
}

/// Transport protocols with ports.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// UDP
    Udp,
    /// TCP
    Tcp,
}

impl Protocol {
    /// Its number (IANA)
    pub const fn number(self) -> u8 {
        match self {
            Self::Udp => 17,
            Self::Tcp => 6,
        }
    }

    /// The one with a number.
    pub fn of_number(number: u8) -> Option<Self> {
        [Self::Udp, Self::Tcp].into_iter().find(|protocol| protocol.number() == number)
    }
}

/// `towpath cm`
#[derive(Args)]
pub struct Cm {
    /// As for `up`
    #[command(flatten)]
    pub follow: Follow,
    /// As for `up`
    #[command(flatten)]
    pub settings: Settings,
    /// Socket of the `towpath fpm` to send to; default: the one of this namespace's instance
    #[arg(long)]
    pub socket: Option<PathBuf>,
    /// Send to the `towpath fpm --listen` of another host, by TLS. Connections are then not handed over
    #[arg(long = "connect", value_name = "ADDR:PORT", conflicts_with_all = ["socket", "flows"], requires_all = Tls::NAMES)]
    pub far: Option<SocketAddr>,
    /// For --connect
    #[command(flatten)]
    pub tls: Tls,
}

/// Who the two ends of a connection between hosts are
#[derive(Args, Clone)]
pub struct Tls {
    /// This host's certificate in PEM, and those that lead from it to the authority's
    #[arg(long, value_name = "FILE", requires = "far")]
    pub tls_certificate: Option<PathBuf>,
    /// Its private key in PEM, which not everybody may read
    #[arg(long, value_name = "FILE", requires = "far")]
    pub tls_key: Option<PathBuf>,
    /// The certificate, in PEM, of the authority that signs both hosts' certificates
    #[arg(long, value_name = "FILE", requires = "far")]
    pub tls_authority: Option<PathBuf>,
    /// The name or address that the other host's certificate has to be for
    #[arg(long, value_name = "NAME", requires = "far")]
    pub tls_peer: Option<Name>,
}

impl Tls {
    const NAMES: [&str; 4] = ["tls_certificate", "tls_key", "tls_authority", "tls_peer"];

    /// All of it, or nothing.
    pub fn identity(&self) -> Option<Identity> {
        Some(Identity {
            certificate: self.tls_certificate.clone()?,
            key: self.tls_key.clone()?,
            authority: self.tls_authority.clone()?,
            peer: self.tls_peer.clone()?,
        })
    }
}

/// `towpath fpm`
#[derive(Args, Clone)]
pub struct Fpm {
    /// As for `up`
    #[command(flatten)]
    pub serve: Serve,
    /// As for `up`
    #[command(flatten)]
    pub settings: Settings,
    /// Socket to listen on for the `towpath cm`; default: in this namespace's instance
    #[arg(long)]
    pub socket: Option<PathBuf>,
    /// Listen for the `towpath cm --connect` of another host, by TLS. Interfaces of both hosts go by their names, and what
    /// comes in here and is not forwarded fast has to be handed to that host
    #[arg(long = "listen", value_name = "ADDR:PORT", conflicts_with_all = ["socket", "max_flows"], requires = "ports",
        requires_all = Tls::NAMES)]
    pub far: Option<SocketAddr>,
    /// For --listen
    #[command(flatten)]
    pub tls: Tls,
}

impl Fpm {
    /// Where it is told Linux's state.
    pub fn origin(&self) -> Origin {
        match self.far.zip(self.tls.identity()) {
            Some((address, identity)) => {
                let ports = self.serve.ports.iter().map(|port| port.name.clone()).collect();
                Origin::Remote(Remote { address, identity, ports })
            }
            None => Origin::Socket(self.socket.clone()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn cores_are_numbers_and_ranges() {
        let cores = |text: &str| text.parse::<Cores>().map(|cores| cores.0);
        assert_eq!(cores("2-5,7"), Ok(vec![2, 3, 4, 5, 7]));
        assert_eq!(cores("0"), Ok(vec![0]));
        assert_eq!(cores("4096"), Ok(vec![4096]));
        for wrong in ["", ",", "1,", "a", "1-", "-1", "3-2", "4294967295", "0-99999999"] {
            assert!(cores(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn flows_are_chosen_by_word_or_mark() {
        let up = |words: &[&str]| {
            let parsed = Cli::try_parse_from([&["towpath", "up"], words].concat());
            parsed.map_err(|error| error.to_string()).map(|cli| match cli.command {
                Command::Up(Up { serve, follow, .. }) => (follow.flows, serve.max_flows),
                _ => panic!("it was up"),
            })
        };
        assert_eq!(up(&[]), Ok((FlowMode::Flowtable, 65_536)));
        assert_eq!(up(&["--flows", "none", "--max-flows", "0"]), Ok((FlowMode::None, 0)));
        let marked = FlowMode::Mark { value: 0x10, mask: 0xf0 };
        assert_eq!(up(&["--flows", "mark=0x10/0xf0", "--max-flows", "4194303"]), Ok((marked, 4_194_303)));
        for (wrong, why) in [
            (["--flows", "all"], "established"),
            (["--flows", "mark=1/2"], "can never match"),
            (["--max-flows", "4194304"], "4194303"),
            (["--max-flows", "many"], "invalid digit"),
        ] {
            let message = up(&wrong).expect_err("wrong");
            assert!(message.contains(wrong[1]) && message.contains(why), "{message}");
        }
        assert!(Cli::try_parse_from(["towpath", "cm", "--flows", "established"]).is_ok());
        assert!(Cli::try_parse_from(["towpath", "fpm", "--max-flows", "7"]).is_ok());
    }

    #[test]
    fn intervals_are_numbers_within_reason() {
        assert_eq!("0.5".parse(), Ok(Seconds(0.5)));
        for wrong in ["", "0", "0.01", "-1", "nan", "inf", "1e9", "1s"] {
            assert!(wrong.parse::<Seconds>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn metrics_are_on_loopback_unless_an_address_is_given() {
        let up = |words: &[&str]| {
            let parsed = Cli::try_parse_from([&["towpath", "up"], words].concat());
            parsed.map_err(|error| error.to_string()).map(|cli| match cli.command {
                Command::Up(Up { serve, .. }) => (serve.metrics.map(|address| address.to_string()), serve.ports.len()),
                _ => panic!("it was up"),
            })
        };
        assert_eq!(up(&["eth0"]), Ok((None, 1)));
        assert_eq!(up(&["--metrics", "eth0"]), Ok((Some("127.0.0.1:9475".into()), 1)));
        assert_eq!(up(&["--metrics=[::1]:1", "eth0"]), Ok((Some("[::1]:1".into()), 1)));
        let message = up(&["--metrics=localhost"]).expect_err("no address");
        assert!(message.contains("localhost") && message.contains("--metrics"), "{message}");
    }

    #[test]
    fn another_host_is_reached_by_tls_or_not_at_all() {
        const TLS: [&str; 8] =
            ["--tls-certificate", "c", "--tls-key", "k", "--tls-authority", "a", "--tls-peer", "peer.example"];
        let parse =
            |words: &[&str]| Cli::try_parse_from([&["towpath"], words].concat()).map_err(|error| error.to_string());
        let good = parse(&[&["fpm", "--listen", "[::]:7676", "eth0"], &TLS[..]].concat());
        let Ok(Cli { command: Command::Fpm(fpm), .. }) = good else { panic!("does not parse") };
        let Origin::Remote(remote) = fpm.origin() else { panic!("by TLS") };
        assert_eq!((remote.address.to_string(), remote.ports), ("[::]:7676".into(), vec!["eth0".into()]));
        assert!(parse(&[&["cm", "--connect", "192.0.2.1:7676"], &TLS[..]].concat()).is_ok());
        for (words, why) in [
            (&["fpm", "--listen", "192.0.2.1:7676", "eth0"][..], "--tls-certificate"),
            (&["cm", "--connect", "192.0.2.1:7676"], "--tls-peer"),
            (&[&["fpm", "--listen", "192.0.2.1:7676"], &TLS[..]].concat(), "PORTS"),
            (&[&["fpm", "eth0"], &TLS[..]].concat(), "--listen"),
            (&[&["cm"], &TLS[..]].concat(), "--connect"),
            (&[&["cm", "--connect", "192.0.2.1:7676"], &TLS[..6], &["--tls-peer", "a b"]].concat(), "neither the name"),
            (&[&["cm", "--connect", "192.0.2.1:7676", "--flows", "none"], &TLS[..]].concat(), "--flows"),
            (&[&["cm", "--connect", "192.0.2.1:7676", "--socket", "s"], &TLS[..]].concat(), "--socket"),
            (&[&["fpm", "--listen", "192.0.2.1:7676", "eth0", "--max-flows", "1"], &TLS[..]].concat(), "--max-flows"),
            (&[&["cm", "--connect", "fpm.example"], &TLS[..]].concat(), "fpm.example"),
        ] {
            let message = parse(words).map(drop).expect_err("wrong");
            assert!(message.contains(why), "{words:?}: {why:?} is missing in {message}");
        }
    }

    #[test]
    fn explain_takes_in_port() {
        let cli = Cli::try_parse_from(["towpath", "explain", "192.0.2.1", "198.51.100.1", "in", "eth0"]);
        let Ok(Cli { command: Command::Explain(explain), .. }) = cli else { panic!("does not parse") };
        assert_eq!(explain.ingress, ["in", "eth0"]);
    }
}
