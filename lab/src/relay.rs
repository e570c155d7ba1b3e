//! A way between two ends of TCP that takes notes.

use std::io::{Read, Result, Write};
use std::net::{Shutdown, TcpStream};
use std::thread;

/// Passes on what comes, both ways, until both ends have nothing more to say; gives what the client said.
pub fn relay(client: TcpStream, server: TcpStream) -> Result<Vec<u8>> {
    let (back, front) = (server.try_clone()?, client.try_clone()?);
    let answers = thread::spawn(move || pass(back, front));
    let said = pass(client, server);
    drop(answers.join());
    Ok(said)
}

fn pass(mut from: TcpStream, mut to: TcpStream) -> Vec<u8> {
    let (mut all, mut buffer) = (Vec::new(), [0; 4096]);
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        all.extend(&buffer[..length]);
        if to.write_all(&buffer[..length]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
    all
}
