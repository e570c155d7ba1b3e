//! What a trial of the firewall does: rule sets one after the other, and conversations beside.

use crate::random::Random;
use crate::rules::Ruleset;
use std::collections::BTreeSet;
use std::fmt::{Display, Formatter};

/// Conversations of a plan.
const TALKS: u16 = 40;

/// How a stage begins.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// The rule set takes the place of the last one at once.
    Whole,
    /// Only what is different is changed.
    Edits,
    /// The last rule set stays, but all connections are forgotten.
    Forget,
}

#[derive(Clone)]
pub struct Stage {
    /// Its own in a plan
    number: usize,
    pub rules: Ruleset,
    pub how: How,
    /// How often each conversation sends something
    pub turns: u32,
    /// It begins when connections may pass under its rules, not while they are new
    pub patient: bool,
}

/// Rule sets, one after the other, and the conversations beside.
#[derive(Clone)]
pub struct Plan {
    pub seed: u64,
    pub stages: Vec<Stage>,
    /// Numbers of conversations
    pub talks: Vec<u16>,
    /// Packets of no conversation
    pub noise: bool,
}

impl Plan {
    pub fn new(seed: u64, marks: bool) -> Self {
        let mut random = Random::new(seed);
        let mut rules = Ruleset::new(&mut random, marks);
        let mut stages = vec![Stage { number: 0, rules: rules.clone(), how: How::Whole, turns: 50, patient: true }];
        for number in 1..5 {
            let how = match random.below(100) {
                0..12 => How::Forget,
                12..30 => How::Whole,
                _ => How::Edits,
            };
            match how {
                How::Forget => {}
                How::Whole if random.percent(60) => rules = Ruleset::new(&mut random, marks),
                _ => (0..=random.below(2)).for_each(|_| rules.change(&mut random)),
            }
            stages.push(Stage {
                number,
                rules: rules.clone(),
                how,
                turns: 30 + random.below(30) as u32,
                patient: random.below(4) != 0,
            });
        }
        Self { seed, stages, talks: (0..TALKS).collect(), noise: true }
    }

    /// What may be left out, the most first.
    pub fn cuts(&self) -> Vec<Cut> {
        let mut cuts = vec![Cut::Noise];
        cuts.extend(self.talks.chunks(8).map(|talks| Cut::Talks(talks.to_vec())));
        cuts.extend(self.stages.iter().rev().map(|stage| Cut::Stage(stage.number)));
        let sets = || self.stages.iter().map(|stage| &stage.rules);
        cuts.extend(sets().flat_map(Ruleset::ids).collect::<BTreeSet<_>>().into_iter().map(Cut::Rule));
        cuts.extend(sets().flat_map(Ruleset::chains).collect::<BTreeSet<_>>().into_iter().map(Cut::Chain));
        cuts.extend(self.talks.iter().map(|talk| Cut::Talks(vec![*talk])));
        cuts
    }

    /// This plan, simpler.
    pub fn without(&self, cut: &Cut) -> Self {
        let mut plan = self.clone();
        let mut each =
            |change: &dyn Fn(&mut Ruleset)| plan.stages.iter_mut().for_each(|stage| change(&mut stage.rules));
        match cut {
            Cut::Noise => plan.noise = false,
            Cut::Talks(talks) => plan.talks.retain(|talk| !talks.contains(talk)),
            Cut::Stage(number) => plan.stages.retain(|stage| stage.number != *number),
            Cut::Rule(id) => each(&|rules| rules.remove(*id)),
            Cut::Chain(name) => each(&|rules| rules.remove_chain(name)),
            Cut::Nothing => {}
        }
        plan
    }
}

/// What may be left out of a plan.
pub enum Cut {
    Noise,
    Talks(Vec<u16>),
    Stage(usize),
    Rule(u32),
    Chain(String),
    Nothing,
}

impl Display for Plan {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        for (at, Stage { rules, how, .. }) in self.stages.iter().enumerate() {
            let commands = match (how, at.checked_sub(1).map(|before| &self.stages[before].rules)) {
                (How::Forget, _) => "conntrack -F\n".to_owned(),
                (How::Edits, Some(before)) => rules.edits(before, |_, _| None),
                _ => rules.whole(),
            };
            write!(f, "stage {at}:\n{commands}")?;
        }
        Ok(())
    }
}
