//! The XDP program of this binary: loading it against the pinned maps, and what the kernel says about it.

use crate::beside::Places;
use crate::engine::Options;
use crate::error::{Error, Result};
use crate::sys;
use crate::tc::{self, Hook};
use crate::trace::{self, Frames, Traces};
use aya_obj::Object;
use aya_obj::btf::BtfFeatures;
use aya_obj::generated::{bpf_func_info, bpf_insn};
use std::collections::HashMap;
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use towpath_filter::{Capture, one_in, translate};
use towpath_tables::mark::{CAPTURED, Function, Number, PATIENCE, SHADOW, traced};
use towpath_tables::record::TableId;

/// Names of the programs in the object: the one for ports of the XDP engine, and for those of the user engine.
const NAME: &str = "towpath";
const NAME_USER: &str = "towpath_user";
/// What each is called in the kernel while it forwards nothing.
const NAME_SHADOW: &str = "towpath_shadow";
/// The one for ports of both while somebody traces, and with which names of functions begin that only it calls.
const NAME_TRACED: &str = "towpath_traced";
const TRACE_FUNCTIONS: &str = "towpath_trace";
/// What either is called in the kernel while captures are in it.
pub(crate) const NAME_CAPTURE: &str = "towpath_capture";
/// Of every program that runs on ports
pub(crate) const NAMES: [&str; 5] = [NAME, NAME_USER, NAME_SHADOW, NAME_TRACED, NAME_CAPTURE];
/// BPF_LD | BPF_IMM | BPF_DW: loads 64 bits, which this instruction and the next one hold.
const LOAD_64: u8 = 0x18;
/// BPF_JMP | BPF_CALL: calls the helper function with the number in `imm`, or, with BPF_PSEUDO_KFUNC_CALL for source
/// register, the kernel function with that BTF identifier.
const CALL: u8 = 0x85;
const KERNEL_FUNCTION: u8 = 2;
/// As `KERNEL_FUNCTION`, for a function of the program, so many instructions behind the next one (BPF_PSEUDO_CALL).
const OWN_FUNCTION: u8 = 1;
/// BPF_ALU64 | BPF_MOV | BPF_K: sets a register
const SET: u8 = 0xb7;
/// Lines of the verifier's log that an error shows; the last ones say what is wrong.
const LOG_LINES: usize = 40;

/// Room for the verifier's log.
const LOG_BYTES: usize = 1 << 20;

/// An ELF file is read in place and must be aligned.
#[repr(C, align(8))]
struct Aligned<B: ?Sized>(B);
static OBJECT: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/towpath-xdp.o")));

/// A loaded program.
#[derive(Debug)]
pub struct Program {
    fd: OwnedFd,
    accept: Option<OwnedFd>,
    sees_beside: bool,
}

/// What the kernel says about the program.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ProgramFacts {
    /// Identifier, as in `bpftool prog show id`
    pub id: u32,
    /// Instructions the verifier looked at, all paths taken together (0 before 5.16)
    pub verified_instructions: u32,
    /// BPF instructions
    pub instructions: u32,
    /// Bytes of machine code; 0 if the kernel interprets it
    pub jited_bytes: u32,
}

impl Program {
    /// Loads the program; each map is the one pinned at its path. Frames that the captures match go to Linux; what becomes of
    /// those that traces match is told.
    pub(crate) fn load(
        pins: &[(&'static str, PathBuf)],
        options: Options,
        captures: &[Capture],
        traces: &Traces,
    ) -> Result<Self> {
        let name = match options.sockets {
            _ if traces.any() => NAME_TRACED,
            true => NAME_USER,
            false => NAME,
        };
        let linked = Linked::with(pins, traces)?;
        let mut code = linked.code(name)?;
        let accept = options.flows.then(|| linked.load_tc(&tc::ACCEPT)).transpose()?;
        let patience = options.patience.map_or(0, |patience| patience.as_nanos() as u64);
        set_number(&mut code.instructions, PATIENCE, patience);
        set_number(&mut code.instructions, SHADOW, options.shadow.into());
        code.set_captures(captures)?;
        code.set_traces(traces)?;
        let name = match options.shadow {
            _ if !captures.is_empty() => NAME_CAPTURE,
            true => NAME_SHADOW,
            false => name,
        };
        let load = |places: Option<&Places>| {
            let mut code = code.clone();
            set_places(&mut code.instructions, places);
            code.load(name, sys::AttachType::Xdp).map(|fd| Self { fd, accept: None, sees_beside: places.is_some() })
        };
        let program = match Places::find() {
            Ok(places) if options.looks() => load(Some(&places)).or_else(|error| {
                tracing::warn!("the XDP program may not look at what travels beside frames: {error}");
                load(None)
            }),
            _ => load(None),
        }?;
        Ok(Self { accept, ..program })
    }

    /// The tc program that goes with it, if there are flows.
    pub(crate) fn accept(&self) -> Option<BorrowedFd<'_>> {
        self.accept.as_ref().map(AsFd::as_fd)
    }

    /// Whether it sees what travels beside the frames of a veth.
    pub fn sees_beside(&self) -> bool {
        self.sees_beside
    }

    /// Its descriptor, for links and test runs.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// What the kernel says about it.
    pub fn facts(&self) -> Result<ProgramFacts> {
        let info = sys::program_info(self.fd()).map_err(|e| Error::io("ask about the XDP program", e))?;
        Ok(ProgramFacts {
            id: info.id,
            verified_instructions: info.verified_insns,
            instructions: info.xlated_prog_len / 8,
            jited_bytes: info.jited_prog_len,
        })
    }
}

/// The object's programs over the maps that are pinned, and over those of the traces. Without traces the program for them is
/// left out.
struct Linked {
    object: Object,
    maps: HashMap<&'static str, OwnedFd>,
    types: OwnedFd,
}

impl Linked {
    fn with(pins: &[(&'static str, PathBuf)], traces: &Traces) -> Result<Self> {
        let mut object =
            Object::parse(&OBJECT.0).map_err(|e| Error::Object(format!("cannot be read: {}", chain(&e))))?;
        let mut maps = pins.iter().map(|(name, path)| Ok((*name, open(path)?))).collect::<Result<HashMap<_, _>>>()?;
        for (name, fd) in traces.maps() {
            let fd = fd.try_clone_to_owned().map_err(|e| Error::io(format!("take map {name}"), e))?;
            maps.insert(name, fd);
        }
        let types = load_types(&mut object)?;
        if !traces.any() {
            object.programs.remove(NAME_TRACED);
            object.functions.retain(|_, function| !function.name.starts_with(TRACE_FUNCTIONS));
            object.maps.retain(|name, _| !trace::MAPS.contains(&name.as_str()));
        }
        relocate(&mut object, &maps)?;
        Ok(Self { object, maps, types })
    }

    /// A program's code, with the tables' lengths in it.
    fn code(&self, name: &str) -> Result<Code<'_>> {
        let program = self.object.programs.get(name).ok_or_else(|| Error::Object(format!("has no program {name}")))?;
        let function = self.object.functions.get(&(program.section_index, program.address));
        let function = function.ok_or_else(|| Error::Object(format!("has no code for {name}")))?;
        let mut instructions = function.instructions.clone();
        set_lengths(&mut instructions, &self.maps)?;
        let functions = function.func_info.func_info.clone();
        Ok(Code { license: &program.license, instructions, functions, types: self.types.as_fd() })
    }

    fn load_tc(&self, hook: &Hook) -> Result<OwnedFd> {
        self.code(hook.name)?.load(hook.name, sys::AttachType::TcxEgress)
    }
}

/// A program and what the kernel is told of it.
#[derive(Clone)]
struct Code<'o> {
    license: &'o CStr,
    instructions: Vec<bpf_insn>,
    functions: Vec<bpf_func_info>,
    types: BorrowedFd<'o>,
}

impl Code<'_> {
    fn load(&self, name: &str, attach: sys::AttachType) -> Result<OwnedFd> {
        let mut log = vec![0u8; LOG_BYTES];
        let functions = sys::Functions { types: self.types, list: &self.functions };
        sys::prog_load(name, self.license, attach, &self.instructions, Some(&functions), &mut log)
            .map_err(|e| rejected(e, &log))
    }

    /// Has the captures' filters called where their mark is.
    fn set_captures(&mut self, captures: &[Capture]) -> Result<()> {
        let answer = if captures.is_empty() { Answer::Always(false) } else { Answer::of(captures)? };
        self.set_filter(CAPTURED, answer);
        Ok(())
    }

    /// The same for each trace's.
    fn set_traces(&mut self, traces: &Traces) -> Result<()> {
        for (number, trace) in traces.running().iter().enumerate() {
            let answer = match trace.as_ref().map(|trace| &trace.frames) {
                None => Answer::Always(false),
                Some(Frames::All) => Answer::Always(true),
                Some(Frames::Matching(filter)) => Answer::of(&[Capture { filter: filter.clone(), only: None }])?,
                Some(Frames::OneIn(number)) => one_in(*number).map(Answer::Function).map_err(Error::Captures)?,
            };
            self.set_filter(traced(number as u32), answer);
        }
        Ok(())
    }

    /// Appends a filter, and has it called where its mark is.
    fn set_filter(&mut self, mark: u32, answer: Answer) {
        let is_call = |instruction: &bpf_insn| {
            instruction.code == CALL && instruction.src_reg() == 0 && instruction.imm as u32 == mark
        };
        let end = self.instructions.len();
        for (at, call) in self.instructions.iter_mut().enumerate().filter(|(_, instruction)| is_call(instruction)) {
            match &answer {
                Answer::Always(matches) => (call.code, call.imm) = (SET, i32::from(*matches)),
                Answer::Function(_) => {
                    call.imm = (end - at - 1) as i32;
                    call.set_src_reg(OWN_FUNCTION);
                }
            }
        }
        if let Answer::Function(filter) = answer {
            self.instructions.extend(filter.into_iter().map(instruction));
            // It takes what the program takes, and gives a number, too.
            if let Some(program) = self.functions.first() {
                self.functions.push(bpf_func_info { insn_off: end as u32, type_id: program.type_id });
            }
        }
    }
}

/// Loads the tc programs that translate addresses, by `Way`.
pub(crate) fn load_translators(pins: &[(&'static str, PathBuf)]) -> Result<[OwnedFd; 2]> {
    let linked = Linked::with(pins, &Traces::default())?;
    let [out, inward] = &tc::TRANSLATE;
    Ok([linked.load_tc(out)?, linked.load_tc(inward)?])
}

/// Gives the kernel the types of the object's functions.
fn load_types(object: &mut Object) -> Result<OwnedFd> {
    // Linux 6.1 knows all of them.
    let known = BtfFeatures::new(true, true, true, true, true, true, true, true);
    let types =
        object.fixup_and_sanitize_btf(&known).map_err(|e| Error::Object(format!("has wrong types: {}", chain(&e))))?;
    let types = types.ok_or_else(|| Error::Object("has no types".into()))?;
    sys::btf_load(&types.to_bytes())
        .map_err(|e| Error::io("give the kernel the types of the XDP program's functions", e))
}

fn open(path: &Path) -> Result<OwnedFd> {
    sys::get_pinned(path).map_err(|e| Error::io(format!("open {}", path.display()), e))
}

/// Puts the maps' descriptors into the code. A map of the object that is none of ours would be private to one program
/// and lose its contents at the next.
fn relocate(object: &mut Object, fds: &HashMap<&'static str, OwnedFd>) -> Result<()> {
    let failed = |e: &dyn std::error::Error| Error::Object(format!("cannot be relocated: {}", chain(e)));
    let maps = object.maps.clone();
    if let Some(name) = maps.keys().find(|name| !fds.contains_key(name.as_str())) {
        return Err(Error::Object(format!("has a map {name} that this crate does not know")));
    }
    let text = object.functions.keys().map(|(section, _)| *section).collect();
    let maps = maps.iter().filter_map(|(name, map)| Some((name.as_str(), fds.get(name.as_str())?.as_raw_fd(), map)));
    object.relocate_maps(maps, &text).map_err(|e| failed(&e))?;
    object.relocate_calls(&text).map_err(|e| failed(&e))
}

/// Puts the tables' lengths where their marks are: the verifier then knows them, and how far the program may reach.
fn set_lengths(code: &mut [bpf_insn], fds: &HashMap<&'static str, OwnedFd>) -> Result<()> {
    for at in 0..code.len() {
        let Some(id) = constant(&code[at..]).and_then(TableId::from_length_mark) else { continue };
        let fd = fds.get(id.section()).ok_or_else(|| Error::Object(format!("asks for table {}", id.name())))?;
        let info = sys::map_info(fd.as_fd()).map_err(|e| Error::io(format!("ask about table {}", id.name()), e))?;
        (code[at].imm, code[at + 1].imm) = ((info.value_size as usize / id.element_size()) as i32, 0);
    }
    Ok(())
}

/// Puts the kernel's functions and numbers where their marks are. Without them the numbers are 0, and what would use them
/// is never reached.
fn set_places(code: &mut [bpf_insn], places: Option<&Places>) {
    for at in 0..code.len() {
        if let Some(number) = number(&code[at..]) {
            (code[at].imm, code[at + 1].imm) = (places.map_or(0, |places| places.number(number)) as i32, 0);
        } else if let Some(function) = function(&code[at]) {
            match places {
                Some(places) => {
                    code[at].imm = places.function(function) as i32;
                    code[at].set_src_reg(KERNEL_FUNCTION);
                }
                None => (code[at].code, code[at].imm) = (SET, 0),
            }
        }
    }
}

/// Puts a number where its mark is.
fn set_number(code: &mut [bpf_insn], mark: u64, number: u64) {
    for at in 0..code.len() {
        if constant(&code[at..]) == Some(mark) {
            (code[at].imm, code[at + 1].imm) = (number as i32, (number >> 32) as i32);
        }
    }
}

/// What a filter's mark becomes.
enum Answer {
    /// Always the same
    Always(bool),
    /// That of a function
    Function(Vec<u64>),
}

impl Answer {
    fn of(captures: &[Capture]) -> Result<Self> {
        translate(captures).map(Self::Function).map_err(Error::Captures)
    }
}

/// The kernel's structure from its encoding.
fn instruction(raw: u64) -> bpf_insn {
    let mut instruction = bpf_insn {
        code: raw as u8,
        _bitfield_align_1: [],
        _bitfield_1: Default::default(),
        off: (raw >> 16) as i16,
        imm: (raw >> 32) as i32,
    };
    instruction.set_dst_reg((raw >> 8) as u8 & 15);
    instruction.set_src_reg((raw >> 12) as u8 & 15);
    instruction
}

fn number(code: &[bpf_insn]) -> Option<Number> {
    Number::from_mark(constant(code)?)
}

fn function(instruction: &bpf_insn) -> Option<Function> {
    let called = instruction.code == CALL && instruction.src_reg() == 0;
    called.then(|| Function::from_mark(instruction.imm as u32)).flatten()
}

/// The plain 64-bit number that the code loads first.
fn constant(code: &[bpf_insn]) -> Option<u64> {
    match code {
        [low, high, ..] if low.code == LOAD_64 && low.src_reg() == 0 => {
            Some((high.imm as u32 as u64) << 32 | u64::from(low.imm as u32))
        }
        _ => None,
    }
}

fn rejected(error: io::Error, log: &[u8]) -> Error {
    if error.raw_os_error() == Some(libc::EPERM) {
        return Error::privileged("load the XDP program", "CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON", error);
    }
    // What stands behind the first zero is left from paths that were found safe.
    let log = String::from_utf8_lossy(log.split(|byte| *byte == 0).next().unwrap_or_default());
    let lines: Vec<&str> = log.lines().collect();
    Error::Program { why: error.to_string(), log: lines[lines.len().saturating_sub(LOG_LINES)..].join("\n") }
}

fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
