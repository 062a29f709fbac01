//! What was measured: rows beside their floors and targets, as a table for people and as JSON.

use std::fmt::Write;

use serde::Serialize;
use serde_json::{Value, json};

use super::figures::median;
use super::machine;

/// What a ratio to a floor should reach.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Target {
    AtLeast(f64),
    AtMost(f64),
}

impl Target {
    fn is_met(self, value: f64) -> bool {
        match self {
            Self::AtLeast(least) => value >= least,
            Self::AtMost(most) => value <= most,
        }
    }

    fn text(self) -> String {
        match self {
            Self::AtLeast(least) => format!("≥ {least}"),
            Self::AtMost(most) => format!("≤ {most}"),
        }
    }
}

/// One figure.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Row {
    measurement: &'static str,
    what: String,
    unit: &'static str,
    /// The median of the rounds; `None`: it could not be measured, see `note`.
    value: Option<f64>,
    rounds: Vec<f64>,
    /// What it is compared with, measured in the same rounds.
    against: Option<String>,
    against_value: Option<f64>,
    against_rounds: Vec<f64>,
    ratio: Option<f64>,
    target: Option<Target>,
    /// The target is one of the value itself, not of the ratio.
    target_is_absolute: bool,
    is_met: Option<bool>,
    note: Option<String>,
}

impl Row {
    pub(super) fn new(
        measurement: &'static str,
        what: impl Into<String>,
        unit: &'static str,
        rounds: Vec<f64>,
    ) -> Self {
        let value = Some(median(&rounds)).filter(|value| value.is_finite());
        Self {
            measurement,
            what: what.into(),
            unit,
            value,
            rounds,
            against: None,
            against_value: None,
            against_rounds: Vec::new(),
            ratio: None,
            target: None,
            target_is_absolute: false,
            is_met: None,
            note: None,
        }
    }

    /// A row without a figure, and why.
    pub(super) fn missing(
        measurement: &'static str,
        what: impl Into<String>,
        unit: &'static str,
        why: impl Into<String>,
    ) -> Self {
        Self::new(measurement, what, unit, Vec::new()).note(why)
    }

    /// Compares it.
    pub(super) fn against(mut self, what: impl Into<String>, rounds: &[f64]) -> Self {
        let value = Some(median(rounds)).filter(|value| value.is_finite());
        self.against = Some(what.into());
        self.against_value = value;
        self.against_rounds = rounds.to_vec();
        self.ratio = self.value.zip(value).map(|(value, floor)| value / floor);
        self
    }

    /// What the ratio should reach.
    pub(super) fn target(mut self, target: Target) -> Self {
        self.target = Some(target);
        self.is_met = self.ratio.map(|ratio| target.is_met(ratio));
        self
    }

    /// What the value itself should reach.
    pub(super) fn absolute_target(mut self, target: Target) -> Self {
        self.target = Some(target);
        self.target_is_absolute = true;
        self.is_met = self.value.map(|value| target.is_met(value));
        self
    }

    pub(super) fn note(mut self, note: impl Into<String>) -> Self {
        self.note = Some(note.into());
        self
    }
}

/// Everything of one run.
#[derive(Debug, Default)]
pub(super) struct Report {
    pub(super) postgres: String,
    pub(super) pgbench: Option<String>,
    /// How this run was asked for.
    pub(super) settings: Value,
    pub(super) rows: Vec<Row>,
}

impl Report {
    pub(super) fn add(&mut self, row: Row) {
        self.rows.push(row);
    }

    /// For machines.
    pub(super) fn json(&self) -> Value {
        json!({
            "taskwire": env!("CARGO_PKG_VERSION"),
            "is_debug_build": cfg!(debug_assertions),
            "postgres": self.postgres,
            "pgbench": self.pgbench,
            "machine": { "cores": machine::cores(), "model": machine::model() },
            "settings": self.settings,
            "rows": self.rows,
        })
    }

    /// For people.
    pub(super) fn table(&self) -> String {
        let mut text = format!(
            "Taskwire {}{}, Postgres {}, {}\n{} cores, {}\n{}\n\n",
            env!("CARGO_PKG_VERSION"),
            if cfg!(debug_assertions) { " (a DEBUG build: its figures say little)" } else { "" },
            self.postgres,
            self.pgbench.as_deref().unwrap_or("no pgbench: floors by connections of sqlx"),
            machine::cores(),
            machine::model(),
            self.settings,
        );
        let head = ["", "measured", "", "compared with", "", "ratio", "target", "met"];
        let cells: Vec<[String; 8]> =
            std::iter::once(head.map(str::to_owned)).chain(self.rows.iter().map(cells)).collect();
        let widths: Vec<usize> = (0..8)
            .map(|place| cells.iter().map(|row| row[place].chars().count()).max().unwrap_or(0))
            .collect();
        let notes = std::iter::once(&None).chain(self.rows.iter().map(|row| &row.note));
        for (row, note) in cells.iter().zip(notes) {
            let mut line = String::new();
            for (place, (cell, width)) in row.iter().zip(&widths).enumerate() {
                // Numbers to the right.
                let _ = if matches!(place, 2 | 4 | 5) {
                    write!(line, "{cell:>width$}  ")
                } else {
                    write!(line, "{cell:<width$}  ")
                };
            }
            text.push_str(line.trim_end());
            text.push('\n');
            if let Some(note) = note {
                let _ = writeln!(text, "{:width$}    ({note})", "", width = widths[0]);
            }
        }
        text
    }
}

fn cells(row: &Row) -> [String; 8] {
    let with_unit = |value: f64| format!("{} {}", shown(value), row.unit);
    [
        row.measurement.to_owned(),
        row.what.clone(),
        row.value.map_or("-".to_owned(), with_unit),
        row.against.clone().unwrap_or_default(),
        row.against_value.map(with_unit).unwrap_or_default(),
        row.ratio.map(|ratio| format!("{ratio:.2}")).unwrap_or_default(),
        row.target
            .map(|target| {
                let unit = if row.target_is_absolute { row.unit } else { "" };
                format!("{} {unit}", target.text()).trim_end().to_owned()
            })
            .unwrap_or_default(),
        row.is_met.map_or("", |is_met| if is_met { "yes" } else { "NO" }).to_owned(),
    ]
}

/// As many digits as say something, thousands apart.
fn shown(value: f64) -> String {
    let decimals = match value.abs() {
        large if large >= 100.0 => 0,
        middle if middle >= 10.0 => 1,
        _ => 3,
    };
    let text = format!("{value:.decimals$}");
    let (whole, rest) = text.split_at(text.find('.').unwrap_or(text.len()));
    let mut apart = String::new();
    for (place, digit) in whole.chars().enumerate() {
        let left = whole.len() - place;
        if place > 0 && left.is_multiple_of(3) && !apart.ends_with('-') {
            apart.push(',');
        }
        apart.push(digit);
    }
    apart + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_one_of_the_ratio_of_medians() {
        let row = Row::new("creates", "x", "tasks/s", vec![10.0, 30.0, 20.0])
            .against("floor", &[10.0, 10.0, 40.0])
            .target(Target::AtLeast(1.9));
        assert_eq!((row.value, row.ratio, row.is_met), (Some(20.0), Some(2.0), Some(true)));
        let none = Row::missing("life", "slots", "tasks/s", "not in this build")
            .target(Target::AtLeast(2.0));
        assert_eq!((none.value, none.is_met), (None, None));
    }

    #[test]
    fn figures_are_shown_with_the_digits_that_say_something() {
        assert_eq!(shown(1_234_567.8), "1,234,568");
        assert_eq!(shown(-12_345.0), "-12,345");
        assert_eq!(shown(99.96), "100.0");
        assert_eq!(shown(0.634_56), "0.635");
    }
}
