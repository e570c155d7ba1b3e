//! The control socket: one JSON request a line, one JSON answer a line. What clients send is bounded in size, number
//! and time; nothing a client does reaches the packet path or holds up the daemon.

use crate::cli::{NatMapping, Protocol};
use crate::clients;
use crate::filter::Changes;
use anyhow::{Context, Result, bail};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::IpAddr;
use std::num::NonZeroU32;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

/// Longest request in bytes: as many filters at once as there may be.
const REQUEST_LIMIT: u64 = 64 << 20;
/// Most addresses in one question: what they take fits the limit, and answering holds nobody up.
pub const DESTINATIONS: usize = 256;
/// Clients served at once; more are turned away.
const CLIENT_LIMIT: usize = 16;
/// A client that neither sends nor takes anything for this long is turned away.
const CLIENT_PATIENCE: Duration = Duration::from_secs(10);

/// What a client may ask.
#[derive(Serialize, Deserialize, Debug, PartialEq, Eq)]
#[serde(tag = "request", rename_all = "lowercase", deny_unknown_fields)]
pub enum Request {
    /// `report::Status`
    Status,
    /// `report::Ports`
    Ports,
    /// `report::Routes`: a page of them
    Routes {
        /// Only routes within this prefix
        within: Option<String>,
        /// `next` of the page before; none for the first
        after: Option<String>,
    },
    /// `report::Neighbors`
    Neighbors,
    /// `report::Nexthops`
    Nexthops,
    /// `report::Exceptions`
    Exceptions,
    /// `report::Stats`
    Stats,
    /// `report::Flows`: a page of them
    Flows {
        /// `next` of the page before; none for the first
        after: Option<u32>,
    },
    /// `report::Explanation`
    Explain(Packet),
    /// `report::Destinations`: what the tables do with packets to these
    Destinations {
        /// No more than `control::DESTINATIONS`
        addresses: Vec<IpAddr>,
        /// Where the packets come from, as far as rules ask; None: by no port, and from no particular address
        arrival: Option<Arrival>,
    },
    /// Adds a mapping; answered with `true` when it is in force
    NatAdd(NatMapping),
    /// Ends a mapping; answered with `true` when it is over
    NatDel(NatMapping),
    /// `report::Mappings`
    NatList,
    /// Tell packets from now on: `report::TraceBegun`, then `report::TraceLine` for each, until the client has had enough and
    /// sends no more, or hangs up
    Trace(Wanted),
    /// Changes the filters; answered with `true` when it is in force
    FilterChange(Changes),
    /// `report::Filters`: a page of them
    FilterList {
        /// `next` of the page before; none for the first
        after: Option<usize>,
    },
    /// Take the fast path off and exit; answered with `true` before
    Stop,
    /// Leave the fast path to the next daemon and exit; answered with `true` before
    Leave,
}

/// What to trace.
#[derive(Serialize, Deserialize, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Instructions of a filter for frames as they arrive, as `towpath_filter::instruction` encodes them; none: all frames
    pub filter: Option<Vec<u64>>,
    /// Only those that go to Linux
    pub exceptions: bool,
    /// Only those that go to Linux for the reason of this name
    pub reason: Option<String>,
    /// So many a second at most
    pub rate: u32,
    /// Only one frame in so many, drawn at random, whatever the filter, and told in brief (`report::TraceLine::Drawn`)
    pub one_in: Option<NonZeroU32>,
}

/// Where packets come from, as far as rules (`ip rule`) ask.
#[derive(Serialize, Deserialize, Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arrival {
    /// Index of the port
    pub ifindex: u32,
    /// Of the destinations' family; in IPv6 also none (`::`)
    pub source: IpAddr,
}

/// A packet to explain.
#[derive(Serialize, Deserialize, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Source address
    pub source: IpAddr,
    /// Destination address
    pub destination: IpAddr,
    /// Port it comes in by
    pub port: Option<String>,
    /// Transport protocol
    pub protocol: Protocol,
    /// Source port
    pub sport: u16,
    /// Destination port
    pub dport: u16,
    /// Length of the IP packet in bytes
    pub length: u16,
    /// TTL or hop limit
    pub ttl: u8,
}

/// An answer: what was asked for, or why not.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Answer<T> {
    Ok(T),
    Error(String),
}

/// The line that answers with `value`.
pub fn answer<T: Serialize>(value: Result<T>) -> String {
    let answer = match value {
        Ok(value) => Answer::Ok(value),
        Err(error) => Answer::Error(format!("{error:#}")),
    };
    serde_json::to_string(&answer).unwrap_or_else(|error| format!(r#"{{"error":"cannot encode the answer: {error}"}}"#))
}

/// Listens at `path` and serves clients by `handle` in threads of their own, until the process ends. `handle` gives
/// None when the daemon is on its way out. A client that traces is `trace`'s from then on.
pub fn serve(
    path: &Path,
    handle: impl Fn(Request) -> Option<String> + Send + Sync + 'static,
    trace: impl Fn(Wanted, UnixStream) -> Result<()> + Send + Sync + 'static,
) -> Result<()> {
    let _ = std::fs::remove_file(path);
    let listener = UnixListener::bind(path).with_context(|| format!("cannot listen on {}", path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
        .with_context(|| format!("cannot protect {}", path.display()))?;
    clients::serve("control", listener, CLIENT_LIMIT, move |stream| serve_client(stream, &handle, &trace))
}

fn serve_client(
    stream: UnixStream,
    handle: &impl Fn(Request) -> Option<String>,
    trace: &impl Fn(Wanted, UnixStream) -> Result<()>,
) -> Result<()> {
    stream.set_read_timeout(Some(CLIENT_PATIENCE))?;
    stream.set_write_timeout(Some(CLIENT_PATIENCE))?;
    let mut output = stream.try_clone()?;
    let mut input = BufReader::new(stream);
    loop {
        let mut line = Vec::new();
        let length = input.by_ref().take(REQUEST_LIMIT).read_until(b'\n', &mut line)?;
        if length == 0 {
            return Ok(());
        }
        let complete = line.ends_with(b"\n");
        let reply = match serde_json::from_slice(&line) {
            Ok(Request::Trace(wanted)) if complete => return trace(wanted, output),
            Ok(request) if complete => match handle(request) {
                Some(reply) => reply,
                None => answer::<()>(Err(anyhow::anyhow!("the daemon is stopping"))),
            },
            Ok(_) => answer::<()>(Err(anyhow::anyhow!("a request must end with a newline"))),
            Err(error) => answer::<()>(Err(anyhow::anyhow!("not a request: {error}"))),
        };
        output.write_all(reply.as_bytes())?;
        output.write_all(b"\n")?;
        if !complete {
            return Ok(());
        }
    }
}

/// A connection to the daemon of an instance.
pub struct Client {
    stream: BufReader<UnixStream>,
}

impl Client {
    /// Connects; None if no daemon listens at `path`.
    pub fn connect(path: &Path) -> Result<Option<Self>> {
        use std::io::ErrorKind::{ConnectionRefused, NotFound};
        match UnixStream::connect(path) {
            Ok(stream) => Ok(Some(Self { stream: BufReader::new(stream) })),
            Err(error) if matches!(error.kind(), ConnectionRefused | NotFound) => Ok(None),
            Err(error) => Err(error).with_context(|| format!("cannot reach the daemon at {}", path.display())),
        }
    }

    /// Asks, and waits for the answer.
    pub fn ask<T: DeserializeOwned>(&mut self, request: &Request) -> Result<T> {
        let mut line = serde_json::to_string(request)?;
        line.push('\n');
        self.stream.get_mut().write_all(line.as_bytes()).context("the daemon does not listen")?;
        self.next()
    }

    /// Waits for the next answer, where a request has several.
    pub fn next<T: DeserializeOwned>(&mut self) -> Result<T> {
        let mut reply = String::new();
        if self.stream.read_line(&mut reply).context("the daemon does not answer")? == 0 {
            bail!("the daemon hung up");
        }
        value(&reply)
    }
}

impl Client {
    /// The connection, for whoever says that nothing more will be asked.
    pub fn hang_up(&self) -> Result<UnixStream> {
        self.stream.get_ref().try_clone().context("no descriptor is left")
    }
}

/// What a line answers.
pub fn value<T: DeserializeOwned>(answer: &str) -> Result<T> {
    match serde_json::from_str(answer).context("the daemon's answer is of another version of towpath")? {
        Answer::Ok(value) => Ok(value),
        Answer::Error(text) => bail!(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(name: &str) -> std::path::PathBuf {
        let path = std::env::temp_dir().join(format!("towpath-control-{}-{name}", std::process::id()));
        serve(&path, |request| Some(answer(Ok(format!("{request:?}")))), |_, _| Ok(())).unwrap();
        path
    }

    #[test]
    fn requests_are_answered_in_turn() {
        let path = server("turn");
        let mut client = Client::connect(&path).unwrap().unwrap();
        assert_eq!(client.ask::<String>(&Request::Status).unwrap(), "Status");
        assert_eq!(client.ask::<String>(&Request::Stats).unwrap(), "Stats");
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn a_bad_client_gets_a_message_and_harms_nobody() {
        let path = server("bad");
        let talk = |bytes: &[u8]| {
            let mut stream = UnixStream::connect(&path).unwrap();
            // The server hangs up on a request that is too long before it has all of it.
            let _ = stream.write_all(bytes);
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let mut reply = String::new();
            let _ = stream.read_to_string(&mut reply);
            reply
        };
        assert!(talk(b"\xff\xfe nonsense\n").starts_with(r#"{"error":"not a request"#));
        assert!(talk(br#"{"request":"status"}"#).contains("newline"));
        assert!(talk(&vec![b'x'; 100_000]).starts_with(r#"{"error":"not a request"#));
        assert!(talk(br#"{"request":"routes","after":-1}"#).starts_with(r#"{"error":"not a request"#));
        let idle: Vec<_> = (0..CLIENT_LIMIT + 4).map(|_| UnixStream::connect(&path).unwrap()).collect();
        drop(idle);
        let deadline = std::time::Instant::now() + Duration::from_secs(5);
        loop {
            let mut client = Client::connect(&path).unwrap().unwrap();
            match client.ask::<String>(&Request::Status) {
                Ok(text) => break assert_eq!(text, "Status"),
                Err(error) => assert!(std::time::Instant::now() < deadline, "{error:#}"),
            }
        }
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn nobody_there() {
        assert!(Client::connect(Path::new("/nonexistent/towpath")).unwrap().is_none());
    }
}
