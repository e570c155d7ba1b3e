//! Loading the benchmarks' own XDP programs.

use anyhow::{Context, Result, anyhow};
use aya::maps::{Array, DevMap};
use aya::programs::xdp::{XdpLinkId, XdpMode};
use aya::programs::{ProgramFd, Xdp};
use aya::{Ebpf, EbpfLoader};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/towpath-bench-bpf.o"));

/// One loaded copy of the object: its own maps, its own programs.
pub struct Object(Ebpf);

impl Object {
    /// Loads the object with room for `variations` frames.
    pub fn load(variations: u32) -> Result<Object> {
        let mut loader = EbpfLoader::new();
        loader.map_max_entries("VARIATIONS", variations.max(1));
        Ok(Object(loader.load(OBJECT).context("load the benchmark's BPF object")?))
    }

    fn program(&mut self, name: &str) -> Result<&mut Xdp> {
        let program = self.0.program_mut(name).with_context(|| format!("the object has no program '{name}'"))?;
        let program: &mut Xdp = program.try_into()?;
        if program.fd().is_err() {
            program.load().with_context(|| format!("load program '{name}'"))?;
        }
        Ok(program)
    }

    /// The descriptor of a loaded program.
    pub fn fd(&mut self, name: &str) -> Result<ProgramFd> {
        Ok(self.program(name)?.fd()?.try_clone()?)
    }

    /// Attaches a program natively to an interface of the calling thread's namespace; it stays while `self` lives.
    pub fn attach(&mut self, name: &str, ifindex: u32) -> Result<XdpLinkId> {
        self.program(name)?
            .attach_to_if_index(ifindex, XdpMode::Driver)
            .with_context(|| format!("attach program '{name}' to interface {ifindex}"))
    }

    /// Sends what `source`, `relay` and `redirect` redirect to this interface of the calling thread's namespace.
    pub fn set_out(&mut self, ifindex: u32) -> Result<()> {
        let mut out = DevMap::try_from(self.map("OUT")?)?;
        Ok(out.set(0, ifindex, None, 0)?)
    }

    /// Lets `fib_forward` send to this interface of the calling thread's namespace.
    pub fn add_port(&mut self, ifindex: u32) -> Result<()> {
        let mut ports = DevMap::try_from(self.map("PORTS")?)?;
        ports.set(ifindex, ifindex, None, 0).with_context(|| format!("add interface {ifindex} to PORTS"))
    }

    /// Tells `source` what to send: the frame, the family, whether the time of sending goes into it, and what varies
    /// (a power of two of them).
    pub fn set_source(
        &mut self,
        template: &[u8; 64],
        family: u32,
        stamped: bool,
        variations: &[[u64; 2]],
    ) -> Result<()> {
        if !variations.len().is_power_of_two() {
            return Err(anyhow!("{} variations: not a power of two", variations.len()));
        }
        let mut table: Array<_, [u64; 2]> = Array::try_from(self.map("VARIATIONS")?)?;
        for (index, variation) in variations.iter().enumerate() {
            table.set(index as u32, variation, 0)?;
        }
        let mut words = [0u64; 10];
        for (word, bytes) in words.iter_mut().zip(template.chunks_exact(8)) {
            *word = bytes.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
        }
        words[8] = (variations.len() as u64 - 1) | u64::from(family | u32::from(stamped) << 8) << 32;
        let mut source: Array<_, [u64; 10]> = Array::try_from(self.map("SOURCE")?)?;
        Ok(source.set(0, words, 0)?)
    }

    /// Lets `paced` send a packet every so many nanoseconds from this time (CLOCK_MONOTONIC, ns) on.
    pub fn set_pace(&mut self, interval: u64, start: u64) -> Result<()> {
        let mut pace: Array<_, [u64; 3]> = Array::try_from(self.map("PACE")?)?;
        Ok(pace.set(0, [interval, start, 0], 0)?)
    }

    /// Packets that `source` has sent.
    pub fn sent(&mut self) -> Result<u64> {
        let source: Array<_, [u64; 10]> = Array::try_from(self.map("SOURCE")?)?;
        Ok(source.get(&0, 0)?[9])
    }

    /// Packets that `sink`, `absorb` or `relay` (0) or `discard` (1) saw.
    pub fn seen(&mut self, slot: u32) -> Result<u64> {
        let seen: Array<_, u64> = Array::try_from(self.map("SEEN")?)?;
        Ok(seen.get(&slot, 0)?)
    }

    /// Reads and clears the latencies that `observe` noted, by bucket.
    pub fn take_latencies(&mut self) -> Result<Vec<u64>> {
        let mut buckets: Array<_, u64> = Array::try_from(self.map("LATENCIES")?)?;
        let mut taken = Vec::with_capacity(buckets.len() as usize);
        for index in 0..buckets.len() {
            taken.push(buckets.get(&index, 0)?);
            buckets.set(index, 0, 0)?;
        }
        Ok(taken)
    }

    /// Times and gateways that `observe` noted, in order.
    pub fn changes(&mut self) -> Result<Vec<(u64, u64)>> {
        let changes: Array<_, [u64; 2]> = Array::try_from(self.map("CHANGES")?)?;
        let kept = changes.len() - 1;
        let [count, _] = changes.get(&kept, 0)?;
        if count > u64::from(kept) {
            return Err(anyhow!("{count} changes are more than the {kept} that are kept"));
        }
        (0..count as u32).map(|index| Ok(changes.get(&index, 0).map(|[time, gateway]| (time, gateway))?)).collect()
    }

    fn map(&mut self, name: &str) -> Result<&mut aya::maps::Map> {
        self.0.map_mut(name).with_context(|| format!("the object has no map '{name}'"))
    }
}
