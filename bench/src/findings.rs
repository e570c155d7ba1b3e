//! What a run found, beside what was aimed at; printed, kept as JSON and plotted.

use serde::Serialize;

/// Everything one run found.
#[derive(Default)]
pub struct Findings {
    /// Figures with an aim
    pub goals: Vec<Goal>,
    /// Raw figures by section, for the JSON file
    pub figures: serde_json::Map<String, serde_json::Value>,
}

/// A figure that has an aim.
#[derive(Clone, Debug, Serialize)]
pub struct Goal {
    /// What was measured
    pub what: String,
    /// What was found
    pub found: f64,
    /// What was aimed at
    pub aim: Aim,
    /// Whether the aim was met
    pub met: bool,
}

/// An aim.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Aim {
    /// At most so much
    AtMost(f64),
    /// At least so much
    AtLeast(f64),
}

impl Findings {
    /// Notes a figure with its aim and prints it.
    pub fn goal(&mut self, what: impl Into<String>, found: f64, aim: Aim) {
        let met = match aim {
            Aim::AtMost(bound) => found <= bound,
            Aim::AtLeast(bound) => found >= bound,
        };
        let goal = Goal { what: what.into(), found, aim, met };
        println!("  {}", goal.row().join("  "));
        self.goals.push(goal);
    }

    /// Keeps raw figures of a section.
    pub fn keep(&mut self, section: &str, figures: impl Serialize) {
        match serde_json::to_value(figures) {
            Ok(value) => self.figures.insert(section.to_owned(), value),
            Err(error) => self.figures.insert(section.to_owned(), error.to_string().into()),
        };
    }
}

impl Goal {
    /// As a row of a table.
    pub fn row(&self) -> [String; 4] {
        let aim = match self.aim {
            Aim::AtMost(bound) => format!("at most {bound}"),
            Aim::AtLeast(bound) => format!("at least {bound}"),
        };
        let verdict = if self.met { "met" } else { "MISSED" };
        [self.what.clone(), format!("{:.2}", self.found), aim, verdict.to_owned()]
    }
}
