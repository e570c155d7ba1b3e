//! Rules that packets of a connection may meet, and that may answer each of them differently.
//!
//! Outside of a flowtable connections go past chains that see every one of their packets in Linux. What the chains said of
//! some of the packets holds for the others only where all that was asked is the same for all of them: addresses, ports,
//! interfaces, what connection tracking knows of the connection, and what routes say while they are what they are. A limit,
//! a quota, the time, a length, a set that changes by itself may answer otherwise the next time. So the chains on the way
//! are gone through for packets that go fast, as the kernel does it, and no connection may pass if one may come to a rule
//! that does something by such an answer. What only counts or logs does nothing. Rules that such a packet cannot come to do
//! not matter: behind an answer of never (`ct state new`, `meta l4proto icmp`, `tcp flags syn`), behind a rule that accepts
//! all established, or in a chain for address translation, which only sees a connection's first packet.
//!
//! A limit, a quota, chance in turn take account of every packet that comes to them, and answer others by it. So what a rule
//! does behind them matters even if no packet of a connection gets there (`limit rate 5/second ct state new accept`).

use super::super::nl::{attrs, be32, find, text_of};
use super::bits::{Answer, Byte, Registers, changing, compare, is, value};
use super::packet::{self, Class};
use super::xt::{self, Account};
use crate::error::CmError;
use std::collections::{BTreeMap, HashMap};

/// Chains that lead from one to the next at most (NFT_JUMP_STACK_SIZE).
const DEPTH: usize = 16;
/// What a rule that could not be gone through is called.
const WHAT: &str = "nftables rules";

type Attributes<'a> = [(u16, &'a [u8])];

/// Sets, as nft_set_flags has it.
pub mod set_flags {
    pub const ANONYMOUS: u32 = 0x1;
    pub const INTERVAL: u32 = 0x4;
    pub const TIMEOUT: u32 = 0x10;
    pub const EVAL: u32 = 0x20;
}

/// A set or map.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Set {
    /// `set_flags`
    pub flags: u32,
    /// Bytes of a key
    pub key: usize,
    /// Bytes that a look-up loads, if any
    pub data: usize,
    /// NFT_OBJECT_* of the objects in it, if any
    pub objects: Option<u32>,
    /// Its elements have expressions that answer by themselves
    pub answers: bool,
}

/// An element of an anonymous set.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Element {
    /// None: whatever is in no other
    pub key: Option<Vec<u8>>,
    pub verdict: Option<Verdict>,
}

/// What becomes of a packet.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// The next rule
    Continue,
    Return,
    Jump(String),
    Goto(String),
    /// Accepted, dropped, or otherwise gone from this hook's chain
    End,
}

impl Verdict {
    /// From NFTA_DATA_VERDICT.
    pub fn decode(what: &str, bytes: &[u8]) -> Result<Self, CmError> {
        let attributes = attrs(what, bytes)?;
        let chain = || find(&attributes, 2).map(text_of).unwrap_or_default();
        Ok(match find(&attributes, 1).and_then(be32).map(|code| code as i32) {
            Some(-1 | -2) => Self::Continue,
            Some(-3) => Self::Jump(chain()),
            Some(-4) => Self::Goto(chain()),
            Some(-5) => Self::Return,
            _ => Self::End,
        })
    }
}

/// One table as far as packets meet it: its chains' rules, each a list of expressions, and its sets.
#[derive(Default, Debug)]
pub struct Table {
    pub chains: BTreeMap<String, Vec<Vec<u8>>>,
    /// Those of them that hang in hooks
    pub bases: Vec<String>,
    pub sets: BTreeMap<String, Set>,
}

/// What all packets of a class come to that get so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Course {
    /// The next rule, for some of them
    Next,
    /// The rule after the one that led here
    Return,
    /// They leave the hook's chain
    End,
}

/// Goes through a table for packets of a class.
pub struct Walk<'a> {
    table: &'a Table,
    class: Class,
    /// Reads the elements of an anonymous set
    elements: &'a mut dyn FnMut(&str) -> Result<Vec<Element>, CmError>,
    known: HashMap<String, Course>,
    depth: usize,
    /// The chain, and what in it may answer differently
    pub found: Option<(String, String)>,
    /// The same for what asks for routes
    pub routed: Option<(String, String)>,
}

/// What a rule knows of its packets on its way from one expression to the next.
struct Rule<'a> {
    chain: &'a str,
    registers: Registers,
    /// All packets that came to it are still there
    certain: bool,
    /// What may have answered differently
    varies: Option<String>,
    /// It took account of the packet
    accounts: bool,
    /// What was loaded last
    last: String,
}

/// What an expression does.
enum Step {
    Answers(Answer, String),
    /// What answers otherwise once it has seen a packet; in this rule alone
    Accounts(String),
    /// Something that not all packets may come to
    Does,
    /// One of these, or nothing; none if only other packets get one
    Verdicts(Vec<Verdict>),
    Nothing,
}

impl<'a> Walk<'a> {
    /// Begins one.
    pub fn new(
        table: &'a Table,
        class: Class,
        elements: &'a mut dyn FnMut(&str) -> Result<Vec<Element>, CmError>,
    ) -> Self {
        Self { table, class, elements, known: HashMap::new(), depth: 0, found: None, routed: None }
    }

    /// Goes through a chain that hangs in a hook.
    pub fn base(&mut self, name: &str) -> Result<(), CmError> {
        self.chain(name).map(drop)
    }

    fn chain(&mut self, name: &str) -> Result<Course, CmError> {
        if let Some(course) = self.known.get(name) {
            return Ok(*course);
        }
        let Some(rules) = self.table.chains.get(name).filter(|_| self.depth <= DEPTH) else {
            return Ok(Course::Return);
        };
        self.depth += 1;
        let mut course = Course::Return;
        for rule in rules {
            match self.rule(name, rule)? {
                Course::Next => {}
                other => {
                    course = other;
                    break;
                }
            }
        }
        self.depth -= 1;
        self.known.insert(name.to_owned(), course);
        Ok(course)
    }

    fn rule(&mut self, chain: &str, list: &[u8]) -> Result<Course, CmError> {
        let registers = Registers::new();
        let mut rule = Rule { chain, registers, certain: true, varies: None, accounts: false, last: String::new() };
        for (_, expression) in attrs(WHAT, list)? {
            let expression = attrs(WHAT, expression)?;
            let name = find(&expression, 1).map(text_of).unwrap_or_default();
            let data = attrs(WHAT, find(&expression, 2).unwrap_or_default())?;
            match self.step(&mut rule, &name, &data)? {
                Step::Nothing | Step::Answers(Answer::Always, _) => {}
                // What follows is done to others, by what was taken account of.
                Step::Answers(Answer::Never, _) if rule.accounts => {}
                Step::Answers(Answer::Never, _) => return Ok(Course::Next),
                Step::Answers(Answer::Fixed, _) => rule.certain = false,
                Step::Answers(Answer::Varies, name) => {
                    rule.certain = false;
                    rule.varies.get_or_insert(name);
                }
                Step::Accounts(name) => {
                    (rule.certain, rule.accounts) = (false, true);
                    rule.varies.get_or_insert(name);
                }
                Step::Does => self.does(&rule),
                Step::Verdicts(verdicts) => {
                    if rule.accounts || !verdicts.is_empty() {
                        self.does(&rule);
                    }
                    return self.leads(&rule, verdicts);
                }
            }
            if self.found.is_some() {
                return Ok(Course::End);
            }
        }
        Ok(Course::Next)
    }

    fn does(&mut self, rule: &Rule<'_>) {
        if let Some(name) = &rule.varies {
            self.found.get_or_insert_with(|| (rule.chain.to_owned(), name.clone()));
        }
    }

    /// What comes of a packet that gets one of these verdicts.
    fn leads(&mut self, rule: &Rule<'_>, verdicts: Vec<Verdict>) -> Result<Course, CmError> {
        let certain = rule.certain && verdicts.len() == 1;
        let mut course = Course::Next;
        for verdict in verdicts {
            course = match verdict {
                Verdict::Continue => Course::Next,
                Verdict::Return => Course::Return,
                Verdict::End => Course::End,
                Verdict::Jump(chain) => match self.chain(&chain)? {
                    Course::End => Course::End,
                    Course::Next | Course::Return => Course::Next,
                },
                Verdict::Goto(chain) => self.chain(&chain)?,
            };
        }
        Ok(if certain { course } else { Course::Next })
    }

    fn step(&mut self, rule: &mut Rule<'_>, name: &str, data: &Attributes<'_>) -> Result<Step, CmError> {
        let number = |kind| find(data, kind).and_then(be32);
        let class = self.class;
        let sets = |register: u16| find(data, register).is_some();
        Ok(match name {
            "meta" if sets(3) => rule.sets(number(3), 4, &packet::meta(class, data).1),
            "ct" if sets(4) => rule.sets(number(4), packet::ct_length(data), &packet::ct(class, data).1),
            "payload" if sets(5) => rule.sets(number(5), 0, name),
            "fib" => {
                self.asks_routes(rule, name);
                rule.loads(number(1), packet::fib(class, data))
            }
            "meta" => rule.loads(number(1), packet::meta(class, data)),
            "ct" => rule.loads(number(1), packet::ct(class, data)),
            "payload" => rule.loads(number(1), packet::payload(class, data)),
            "immediate" => match constant(find(data, 2).unwrap_or_default())? {
                Constant::Verdict(verdict) => Step::Verdicts(vec![verdict]),
                Constant::Value(value) => {
                    rule.registers.write(number(1), &value.into_iter().map(Byte::known).collect::<Vec<_>>());
                    Step::Nothing
                }
            },
            "bitwise" => rule.bitwise(data)?,
            "byteorder" => rule.computes(number(1), number(2), number(4), number(4)),
            // NFT_HASH_SYM takes in what packets may change.
            "hash" if number(7).unwrap_or(0) == 0 => rule.computes(number(1), number(2), number(3), Some(4)),
            "cmp" => {
                let with = bytes(find(data, 3).unwrap_or_default())?;
                let answer = compare(rule.registers.read(number(1), with.len()), number(2).unwrap_or(u32::MAX), &with);
                Step::Answers(answer, rule.asked())
            }
            "range" => {
                let length = bytes(find(data, 3).unwrap_or_default())?.len();
                Step::Answers(rule.asks(number(1), length), rule.asked())
            }
            "lookup" => self.lookup(rule, data)?,
            "objref" => self.object(rule, data),
            "match" => {
                let extension = find(data, 1).map(text_of).unwrap_or_default();
                if xt::asks_routes(&extension) {
                    self.asks_routes(rule, &format!("match {extension}"));
                }
                match xt::answer(class, data) {
                    None => Step::Nothing,
                    Some((Answer::Varies, name)) => match xt::account(&extension) {
                        Account::Nothing => Step::Answers(Answer::Varies, name),
                        Account::Rule => Step::Accounts(name),
                        Account::Anywhere => rule.keeps(&name),
                    },
                    Some((answer, name)) => Step::Answers(answer, name),
                }
            }
            "target" if xt::does_nothing(&find(data, 1).map(text_of).unwrap_or_default()) => Step::Nothing,
            "counter" | "last" | "log" => Step::Nothing,
            // The maximum segment size is in SYNs only.
            "exthdr" if sets(7) && find(data, 2) == Some(&[super::barrier::MAXSEG]) => Step::Nothing,
            "dup" | "exthdr" | "flow_offload" | "fwd" | "masq" | "nat" | "notrack" | "queue" | "redir" | "reject"
            | "synproxy" | "target" | "tproxy"
                if name != "exthdr" || sets(7) =>
            {
                Step::Does
            }
            // What next hops, sockets, options and chance say.
            "exthdr" | "hash" | "inner" | "numgen" | "osf" | "rt" | "socket" | "tunnel" | "xfrm"
                if name != "numgen" || number(3) == Some(RANDOM) =>
            {
                rule.registers = Registers::new();
                Step::Answers(Answer::Varies, name.to_owned())
            }
            "connlimit" | "limit" | "numgen" | "quota" => {
                rule.registers = Registers::new();
                Step::Accounts(name.to_owned())
            }
            // And whatever is unknown.
            _ => rule.keeps(name),
        })
    }

    fn asks_routes(&mut self, rule: &Rule<'_>, name: &str) {
        self.routed.get_or_insert_with(|| (rule.chain.to_owned(), name.to_owned()));
    }

    fn lookup(&mut self, rule: &mut Rule<'_>, data: &Attributes<'_>) -> Result<Step, CmError> {
        let number = |kind| find(data, kind).and_then(be32);
        let name = find(data, 1).map(text_of).unwrap_or_default();
        let inverted = number(5).unwrap_or(0) & 1 != 0;
        let Some(set) = self.table.sets.get(&name).filter(|set| !set.changes()) else {
            rule.registers = Registers::new();
            let accounts = self.table.sets.get(&name).is_none_or(|set| set.answers);
            let name = format!("set {name}");
            if accounts {
                return Ok(rule.keeps(&name));
            }
            rule.answer(Answer::Varies, &name);
            return Ok(if number(3) == Some(0) { Step::Does } else { Step::Nothing });
        };
        let asked = rule.asked();
        let key = rule.registers.read(number(2), set.key).to_vec();
        let elements = match set.flags & (set_flags::ANONYMOUS | set_flags::INTERVAL) == set_flags::ANONYMOUS {
            true if value(&key).is_some() || number(3) == Some(0) => Some((self.elements)(&name)?),
            _ => None,
        };
        let found = value(&key).zip(elements.as_ref()).map(|(key, elements)| {
            let with = |wanted: Option<&[u8]>| elements.iter().find(|element| element.key.as_deref() == wanted);
            with(Some(&key)).or_else(|| with(None))
        });
        if number(3) == Some(0) {
            if let Some(found) = found {
                return Ok(Step::Verdicts(Vec::from_iter(found.and_then(|element| element.verdict.clone()))));
            }
            rule.answer(changing(&key), &asked);
            rule.certain = false;
            return Ok(Step::Verdicts(match elements {
                Some(elements) => elements.into_iter().filter_map(|element| element.verdict).collect(),
                None => self.anywhere(),
            }));
        }
        let answer = match found {
            Some(found) => is(found.is_some()).inverted(inverted),
            None => changing(&key),
        };
        if let Some(register) = number(3) {
            let byte = if changing(&key) == Answer::Varies { Byte::VARYING } else { Byte::FIXED };
            rule.registers.write(Some(register), &vec![byte; set.data]);
        }
        Ok(Step::Answers(answer, asked))
    }

    /// Wherever a map of verdicts may lead.
    fn anywhere(&self) -> Vec<Verdict> {
        let chains = self.table.chains.keys().filter(|name| !self.table.bases.contains(name));
        chains.cloned().map(Verdict::Jump).collect()
    }

    fn object(&mut self, rule: &mut Rule<'_>, data: &Attributes<'_>) -> Step {
        let number = |kind| find(data, kind).and_then(be32);
        let set = find(data, 4).map(text_of).and_then(|name| self.table.sets.get(&name));
        let kind = number(1).or(set.and_then(|set| set.objects));
        match (kind, set) {
            (Some(object::COUNTER), None) if find(data, 4).is_none() => Step::Nothing,
            (Some(object::COUNTER), Some(set)) if !set.changes() => {
                Step::Answers(rule.asks(number(3), set.key), rule.asked())
            }
            (Some(object::QUOTA), _) => rule.keeps("quota"),
            (Some(object::LIMIT), _) => rule.keeps("limit"),
            (Some(object::CONNLIMIT), _) => rule.keeps("ct count"),
            (Some(_), None) if find(data, 4).is_none() => Step::Does,
            _ => rule.keeps("objref"),
        }
    }
}

/// NFT_NG_RANDOM
const RANDOM: u32 = 1;

/// NFT_OBJECT_*
mod object {
    pub const COUNTER: u32 = 1;
    pub const QUOTA: u32 = 2;
    pub const LIMIT: u32 = 4;
    pub const CONNLIMIT: u32 = 5;
}

impl Set {
    /// Whether it may answer differently though nobody changes the rules.
    fn changes(&self) -> bool {
        self.flags & (set_flags::TIMEOUT | set_flags::EVAL) != 0 || self.answers
    }
}

impl Rule<'_> {
    fn loads(&mut self, register: Option<u32>, (bytes, name): (Vec<Byte>, String)) -> Step {
        self.registers.write(register, &bytes);
        self.last = name;
        Step::Nothing
    }

    /// Something is set to what is in a register.
    fn sets(&mut self, register: Option<u32>, length: usize, name: &str) -> Step {
        let answer = self.asks(register, length);
        let asked = if answer == Answer::Varies { self.asked() } else { name.to_owned() };
        self.answer(answer, &asked);
        Step::Does
    }

    /// It answers otherwise once it has seen a packet, and others than this rule may ask it.
    fn keeps(&mut self, name: &str) -> Step {
        self.answer(Answer::Varies, name);
        Step::Does
    }

    fn answer(&mut self, answer: Answer, name: &str) {
        if answer == Answer::Varies {
            self.varies.get_or_insert_with(|| name.to_owned());
        }
    }

    /// What a condition on so many bytes says.
    fn asks(&self, register: Option<u32>, length: usize) -> Answer {
        match self.registers.read(register, length) {
            [] if length > 0 => Answer::Varies,
            bytes => changing(bytes),
        }
    }

    /// So many bytes become something that is computed of others.
    fn computes(&mut self, from: Option<u32>, to: Option<u32>, length: Option<u32>, written: Option<u32>) -> Step {
        let [length, written] = [length, written].map(|number| number.map_or(0, |number| number.min(64) as usize));
        match self.registers.read(from, length) {
            [] => self.registers = Registers::new(),
            bytes => {
                let byte = if changing(bytes) == Answer::Varies { Byte::VARYING } else { Byte::FIXED };
                self.registers.write(to, &vec![byte; written]);
            }
        }
        Step::Nothing
    }

    fn bitwise(&mut self, data: &Attributes<'_>) -> Result<Step, CmError> {
        let number = |kind| find(data, kind).and_then(be32);
        let [mask, xor] = [4, 5].map(|kind| find(data, kind).map(bytes).transpose());
        Ok(match (number(6).unwrap_or(0), mask?, xor?) {
            (0, Some(mask), Some(xor)) if mask.len() == xor.len() => {
                self.registers.mask(number(1), number(2), &mask, &xor);
                Step::Nothing
            }
            // Of two registers since Linux 6.13
            _ if find(data, 8).is_some() => {
                self.registers.write(number(2), &[Byte::VARYING; 16]);
                Step::Nothing
            }
            _ => self.computes(number(1), number(2), number(3), number(3)),
        })
    }

    /// What was loaded last.
    fn asked(&self) -> String {
        self.last.clone()
    }
}

enum Constant {
    Value(Vec<u8>),
    Verdict(Verdict),
}

fn constant(data: &[u8]) -> Result<Constant, CmError> {
    match find(&attrs(WHAT, data)?, 2) {
        Some(verdict) => Ok(Constant::Verdict(Verdict::decode(WHAT, verdict)?)),
        None => bytes(data).map(Constant::Value),
    }
}

/// NFTA_DATA_VALUE.
pub fn bytes(data: &[u8]) -> Result<Vec<u8>, CmError> {
    Ok(find(&attrs(WHAT, data)?, 1).unwrap_or_default().to_vec())
}
