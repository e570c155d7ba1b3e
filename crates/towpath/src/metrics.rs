//! The metrics endpoint: HTTP on TCP, in the network namespace of the daemon. What clients send is bounded in size, number
//! and time, and each connection serves one request.

use crate::clients;
use crate::control::{self, Request};
use crate::openmetrics::{self, Answers, CONTENT_TYPE};
use anyhow::{Context, Result, bail};
use serde::de::DeserializeOwned;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

/// Where it listens if nobody says where.
pub const DEFAULT: &str = "127.0.0.1:9475";
const PATH: &str = "/metrics";
/// Longest request in bytes.
const REQUEST_LIMIT: usize = 8192;
const HEADERS_LIMIT: usize = 64;
/// Clients served at once; more are turned away.
const CLIENT_LIMIT: usize = 8;
/// For a whole request, and as much for taking the answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// An endpoint that listens, and answers when it is served.
pub struct Endpoint(TcpListener);

impl Endpoint {
    /// Takes the address.
    pub fn open(address: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind(address)
            .with_context(|| format!("cannot serve metrics at {address}; give another address: --metrics=ADDR:PORT"))?;
        tracing::info!("metrics at http://{address}{PATH}");
        Ok(Self(listener))
    }

    /// Serves clients in threads of their own, until the process ends, by what `handle` answers. `handle` gives None when
    /// the daemon is on its way out.
    pub fn serve(self, handle: impl Fn(Request) -> Option<String> + Send + Sync + 'static) -> Result<()> {
        clients::serve("metrics", self.0, CLIENT_LIMIT, move |stream| serve_client(stream, &handle))
    }
}

fn serve_client(mut stream: TcpStream, handle: &impl Fn(Request) -> Option<String>) -> Result<()> {
    let request = receive(&mut stream)?;
    let answer = judge(&request, || ask(handle).and_then(|answers| Ok(openmetrics::text(answers)?)));
    send(&mut stream, answer.as_bytes())
}

/// The head of a request, or what of it came in time and fits.
fn receive(stream: &mut TcpStream) -> Result<Vec<u8>> {
    let deadline = Instant::now() + PATIENCE;
    let (mut request, mut chunk) = (Vec::new(), [0; 1024]);
    while request.len() < REQUEST_LIMIT && matches!(head(&request), Head::Unfinished) {
        stream.set_read_timeout(Some(left(deadline)?))?;
        match stream.read(&mut chunk)? {
            0 => break,
            length => request.extend_from_slice(&chunk[..length]),
        }
    }
    Ok(request)
}

fn send(stream: &mut TcpStream, mut bytes: &[u8]) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !bytes.is_empty() {
        stream.set_write_timeout(Some(left(deadline)?))?;
        let length = stream.write(bytes)?;
        bytes = &bytes[length..];
    }
    Ok(())
}

fn left(deadline: Instant) -> Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        bail!("too slow");
    }
    Ok(left)
}

/// What is known of a request's head.
enum Head {
    /// Method and path
    Request(String, String),
    /// More must come
    Unfinished,
    /// No HTTP
    Malformed,
    TooManyHeaders,
}

fn head(request: &[u8]) -> Head {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_LIMIT];
    let mut parsed = httparse::Request::new(&mut headers);
    match parsed.parse(request) {
        Ok(httparse::Status::Complete(_)) => match (parsed.method, parsed.path) {
            (Some(method), Some(path)) => Head::Request(method.into(), path.into()),
            _ => Head::Malformed,
        },
        Ok(httparse::Status::Partial) => Head::Unfinished,
        Err(httparse::Error::TooManyHeaders) => Head::TooManyHeaders,
        Err(_) => Head::Malformed,
    }
}

/// The answer to a request.
fn judge(request: &[u8], metrics: impl FnOnce() -> Result<String>) -> String {
    let (method, path) = match head(request) {
        Head::Request(method, path) => (method, path),
        Head::Malformed => return refusal("400 Bad Request", ""),
        Head::Unfinished if request.len() < REQUEST_LIMIT => return refusal("400 Bad Request", ""),
        Head::Unfinished | Head::TooManyHeaders => return refusal("431 Request Header Fields Too Large", ""),
    };
    if path.split('?').next() != Some(PATH) {
        return refusal("404 Not Found", "");
    }
    match method.as_str() {
        "GET" => match metrics() {
            Ok(text) => response("200 OK", CONTENT_TYPE, "", &text),
            Err(error) => {
                tracing::debug!("no metrics: {error:#}");
                refusal("503 Service Unavailable", "")
            }
        },
        _ => refusal("405 Method Not Allowed", "Allow: GET\r\n"),
    }
}

fn refusal(status: &str, header: &str) -> String {
    response(status, "text/plain; charset=utf-8", header, &format!("{status}: metrics are at {PATH}\n"))
}

fn response(status: &str, content_type: &str, header: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {length}\r\n{header}Connection: close\r\n\r\n{body}"
    )
}

fn ask(handle: &impl Fn(Request) -> Option<String>) -> Result<Answers> {
    Ok(Answers {
        status: of(handle, Request::Status)?,
        stats: of(handle, Request::Stats)?,
        exceptions: of(handle, Request::Exceptions)?,
    })
}

fn of<T: DeserializeOwned>(handle: &impl Fn(Request) -> Option<String>, request: Request) -> Result<T> {
    control::value(&handle(request).context("the daemon is stopping")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(request: &[u8]) -> String {
        let answer = judge(request, || Ok("# EOF\n".into()));
        let (line, rest) = answer.split_once("\r\n").expect("a status line");
        let (headers, body) = rest.split_once("\r\n\r\n").expect("an empty line");
        assert!(headers.contains(&format!("Content-Length: {}\r\n", body.len())), "{headers}");
        line.strip_prefix("HTTP/1.1 ").expect("HTTP").to_owned()
    }

    #[test]
    fn only_whole_requests_for_the_metrics_are_answered_with_them() {
        assert_eq!(status(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n"), "200 OK");
        assert_eq!(status(b"GET /metrics?name=x HTTP/1.0\r\n\r\n"), "200 OK");
        assert_eq!(status(b"GET / HTTP/1.1\r\n\r\n"), "404 Not Found");
        assert_eq!(status(b"POST /metrics HTTP/1.1\r\n\r\n"), "405 Method Not Allowed");
        for malformed in [&b"\xff\xfe\r\n\r\n"[..], b"GET /metrics HTTP/1.1\r\n", b"", b"GET /metrics\r\n\r\n"] {
            assert_eq!(status(malformed), "400 Bad Request", "{malformed:?}");
        }
        let many = format!("GET /metrics HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(HEADERS_LIMIT + 1));
        assert_eq!(status(many.as_bytes()), "431 Request Header Fields Too Large");
        let long = format!("GET /metrics HTTP/1.1\r\nA: {}", "b".repeat(REQUEST_LIMIT));
        assert_eq!(status(long.as_bytes()), "431 Request Header Fields Too Large");
        assert!(judge(b"GET /metrics HTTP/1.1\r\n\r\n", || bail!("no")).starts_with("HTTP/1.1 503 "));
    }
}
