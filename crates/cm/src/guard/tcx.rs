//! Programs attached by tcx. The kernel looks for them under the lock that everything of rtnetlink works under
//! (kernel/bpf/tcx.c, tcx_prog_query, Linux 6.18), so to ask may take as long as it takes whoever changes routes by the hundred
//! thousand to let go of it for a moment. A thread of its own waits there, and other settings are found meanwhile.

use super::bpf::{Tcx, tcx_programs};
use crate::error::CmError;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Programs of others on a place of an interface: where, and how many.
pub type Attached = (u32, Tcx, u32);
/// Places with programs; None: the kernel has no tcx.
type Answer = Option<Vec<Attached>>;
/// An answer, and to which question.
type Said = (u64, Result<Answer, CmError>);

/// Whoever asks.
pub struct Asker {
    shared: Arc<Shared>,
    /// Readable when there is an answer that is new
    bell: UnixStream,
    /// For the thread, until there is one
    ringer: Option<UnixStream>,
    own: &'static [&'static str],
    /// What is asked about, and a number for it
    ports: Vec<u32>,
    epoch: u64,
    latest: Answer,
    /// What the thread has said last
    heard: Option<Said>,
}

#[derive(Default)]
struct Shared {
    work: Mutex<Work>,
    changed: Condvar,
}

#[derive(Default)]
struct Work {
    /// To be asked about
    question: Option<(u64, Vec<u32>)>,
    answer: Option<Said>,
    /// Nobody will ask any more
    over: bool,
}

impl Shared {
    fn work(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Asker {
    /// For the thread's network namespace; programs of these names do not count.
    pub fn new(own: &'static [&'static str]) -> Result<Self, CmError> {
        let (bell, ringer) = UnixStream::pair().map_err(|e| CmError::io("tcx: a pair of sockets", e))?;
        for end in [&bell, &ringer] {
            end.set_nonblocking(true).map_err(|e| CmError::io("tcx: a pair of sockets", e))?;
        }
        let (shared, ports) = (Arc::default(), Vec::new());
        Ok(Self { shared, bell, ringer: Some(ringer), own, ports, epoch: 0, latest: None, heard: None })
    }

    /// Becomes readable when `ask` would say something new.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    /// What is known of these interfaces. It is asked for anew, for the next time; at once, and waited for, if others were
    /// asked about before.
    pub fn ask(&mut self, ports: Vec<u32>) -> Result<Answer, CmError> {
        if ports != self.ports {
            self.forget();
            self.latest = query(&ports, self.own)?;
            self.ports = ports;
            return Ok(self.latest.clone());
        }
        self.start()?;
        self.hear();
        // The lock is let go before: else the thread would wake up only to wait for it.
        self.shared.work().question = Some((self.epoch, self.ports.clone()));
        self.shared.changed.notify_one();
        match self.heard.take().filter(|(epoch, _)| *epoch == self.epoch) {
            Some((_, Ok(answer))) => self.latest = answer,
            Some((_, Err(error))) => {
                self.forget();
                return Err(error);
            }
            None => {}
        }
        Ok(self.latest.clone())
    }

    /// Has the bell be silent, whether somebody asks or not.
    pub fn hear(&mut self) {
        if let Some(answer) = self.shared.work().answer.take() {
            let mut rung = [0; 16];
            while self.bell.read(&mut rung).is_ok_and(|length| length > 0) {}
            self.heard = Some(answer);
        }
    }

    /// What was asked is of no interest any more.
    fn forget(&mut self) {
        self.epoch += 1;
        self.ports.clear();
    }

    fn start(&mut self) -> Result<(), CmError> {
        let Some(ringer) = self.ringer.take() else { return Ok(()) };
        let (shared, own) = (self.shared.clone(), self.own);
        let thread = std::thread::Builder::new().name("tcx".into()).spawn(move || serve(&shared, ringer, own));
        thread.map(drop).map_err(|e| CmError::io("tcx: a thread", e))
    }
}

impl Drop for Asker {
    fn drop(&mut self) {
        self.shared.work().over = true;
        self.shared.changed.notify_one();
    }
}

/// Answers until nobody asks any more.
fn serve(shared: &Shared, mut ringer: UnixStream, own: &[&str]) {
    let mut last = None;
    loop {
        let idle = |work: &mut Work| work.question.is_none() && !work.over;
        let mut work = shared.changed.wait_while(shared.work(), idle).unwrap_or_else(PoisonError::into_inner);
        let Some((epoch, ports)) = work.question.take().filter(|_| !work.over) else { return };
        drop(work);
        let answer = query(&ports, own);
        let known = answer.as_ref().ok().map(|answer| (epoch, answer.clone()));
        if known.is_some() && known == last {
            continue;
        }
        last = known;
        let mut work = shared.work();
        work.answer = Some((epoch, answer));
        // While the lock is held, so that whoever takes the answer finds the bell rung. If there is no room, it is heard anyway.
        let _ = ringer.write(&[0]);
    }
}

fn query(ports: &[u32], own: &[&str]) -> Result<Answer, CmError> {
    let mut attached = Vec::new();
    for ifindex in ports {
        for place in [Tcx::Ingress, Tcx::Egress] {
            match tcx_programs(*ifindex, place, own)? {
                None => return Ok(None),
                Some(0) => {}
                Some(number) => attached.push((*ifindex, place, number)),
            }
        }
    }
    Ok(Some(attached))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::ErrorKind::WouldBlock;

    /// Else whoever waits for it would be woken for ever where nobody asks any more: the last program may be gone by then.
    #[test]
    fn a_bell_that_was_heard_is_silent() {
        let mut asker = Asker::new(&[]).unwrap();
        asker.shared.work().answer = Some((0, Ok(None)));
        assert_eq!(asker.ringer.as_mut().unwrap().write(&[0]).unwrap(), 1);
        asker.hear();
        assert_eq!(asker.bell.read(&mut [0]).unwrap_err().kind(), WouldBlock);
    }

    #[test]
    fn the_thread_answers_the_next_time_and_rings_only_for_news() {
        let mut asker = Asker::new(&[]).unwrap();
        // No such interface: no programs, and the kernel says so.
        let ports = vec![u32::MAX >> 1];
        let first = asker.ask(ports.clone()).unwrap();
        assert_eq!(asker.ask(ports.clone()).unwrap(), first);
        let mut rung = [0];
        asker.bell.set_nonblocking(false).unwrap();
        asker.bell.read_exact(&mut rung).unwrap();
        asker.bell.set_nonblocking(true).unwrap();
        asker.hear();
        assert_eq!(asker.heard.as_ref().unwrap().1.as_ref().unwrap(), &first);
        assert_eq!(asker.ask(ports.clone()).unwrap(), first);
        // The thread has taken the question once it is there no more, and has nothing new to say.
        while asker.shared.work().question.is_some() {
            std::thread::yield_now();
        }
        assert_eq!(asker.bell.read(&mut rung).unwrap_err().kind(), WouldBlock);
    }
}
