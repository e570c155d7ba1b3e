//! The tc program of this library: loaded with a key and attached to the device.

use crate::device::NAME;
use crate::error::{Error, Result};
use aya::maps::PerCpuArray;
use aya::programs::tc::{NlOptions, TcAttachOptions, TcAttachType, qdisc_add_clsact};
use aya::programs::{LinkOrder, SchedClassifier};
use aya::{Ebpf, EbpfLoader};
use towpath_wire::fptun::{Key, Outcome};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/towpath-fptun.o"));

/// The loaded program. It stays attached as long as there is the device.
#[derive(Debug)]
pub struct Program(Ebpf);

impl Program {
    /// Loads it, and attaches it to the device in the calling thread's network namespace.
    pub fn attach(key: &Key) -> Result<Self> {
        let mut object = EbpfLoader::new()
            .override_global("KEY", key.as_slice(), true)
            .load(OBJECT)
            .map_err(Error::program("load the BPF object"))?;
        let program = object.program_mut("fptun").ok_or_else(|| missing("program"))?;
        let program: &mut SchedClassifier = program.try_into().map_err(Error::program("find the program"))?;
        program.load().map_err(Error::program("load the program"))?;
        // As a link, which goes with the process; before Linux 6.6 by netlink. Such a filter goes with its device: aya would
        // take it off whatever device has the index in the namespace of the thread that ends the link.
        if program
            .attach_with_options(NAME, TcAttachType::Egress, TcAttachOptions::TcxOrder(LinkOrder::default()))
            .is_err()
        {
            qdisc_add_clsact(NAME).map_err(Error::program("give the device a clsact qdisc"))?;
            let by_netlink = TcAttachOptions::Netlink(NlOptions::default());
            let attached = program
                .attach_with_options(NAME, TcAttachType::Egress, by_netlink)
                .and_then(|link| program.take_link(link))
                .map_err(Error::program("attach the program"))?;
            std::mem::forget(attached);
        }
        Ok(Self(object))
    }

    /// What the program has counted, over all CPUs.
    pub fn outcomes(&self) -> Result<[u64; Outcome::ALL.len()]> {
        let map = self.0.map("OUTCOMES").ok_or_else(|| missing("map"))?;
        let counters = PerCpuArray::<_, u64>::try_from(map).map_err(Error::program("find the counters"))?;
        let mut outcomes = [0; Outcome::ALL.len()];
        for (outcome, sum) in Outcome::ALL.into_iter().zip(&mut outcomes) {
            let values = counters.get(&(outcome as u32), 0).map_err(Error::program("read the counters"))?;
            *sum = values.iter().sum();
        }
        Ok(outcomes)
    }
}

fn missing(what: &'static str) -> Error {
    Error::Program { what: "use the BPF object", why: format!("it lacks its {what}") }
}
