//! What an evaluation found, and its table.

use dragon_metrics::WinRate;
use serde::{Deserialize, Serialize};

/// What an evaluation found; written to `report.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Name of the first system.
    pub base: String,
    /// Name of the second system.
    pub tuned: String,
    /// Songs of each system.
    pub n_songs: usize,
    /// One entry a metric, the target first.
    pub metrics: Vec<MetricResult>,
    /// Numbers that are no reward but show when one is hacked.
    pub monitors: Vec<Monitor>,
    /// What speaks against the target's gain, a sentence each.
    pub warnings: Vec<String>,
    /// SHA-256 of the evaluation's config and of the tuned weights; empty for folders of audio.
    #[serde(default)]
    pub inputs_sha256: String,
    /// One entry a song.
    pub songs: Vec<SongResult>,
}

/// A metric of both systems. Distances are printed as distances: lower is better for them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MetricResult {
    /// Its name.
    pub name: String,
    /// The reward that computed it.
    pub reward: String,
    /// Whether it is a distance.
    pub lower_is_better: bool,
    /// Value of the base: the mean over songs, or that of the whole set.
    pub base: f64,
    /// Value of the tuned model.
    pub tuned: f64,
    /// 95 % interval of `tuned - base` over the subsets, scaled to the number of songs only by the subsets' own size.
    pub difference_95: (f64, f64),
    /// Share of the songs on which the tuned model is better; `None` for a metric of sets, or songs without partners.
    pub song_win_rate: Option<WinRate>,
    /// Share of the subsets on which the tuned model is better.
    pub set_win_rate: f64,
    /// Means over the subsets, of the base and of the tuned model: a set's distance or diversity depends on its size.
    pub subset_means: (f64, f64),
    /// Mean difference over the standard deviation of the base's songs, positive where tuned is better.
    pub effect_size: Option<f64>,
    /// Values of the base's songs.
    pub base_songs: Option<Vec<f64>>,
    /// Values of the tuned model's songs.
    pub tuned_songs: Option<Vec<f64>>,
}

impl MetricResult {
    /// Whether the tuned model is better beyond chance, `None` where that cannot be told: by the songs won, whose interval
    /// must not hold a half, and where songs have no values of their own by the interval over the subsets.
    pub fn verdict(&self) -> Option<bool> {
        if let Some(won) = &self.song_win_rate {
            return (won.lower > 0.5 || won.upper < 0.5).then_some(won.lower > 0.5);
        }
        let (low, high) = self.difference_95;
        (low > 0.0 || high < 0.0).then_some((low > 0.0) != self.lower_is_better)
    }
}

/// Means of a number over all songs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Monitor {
    /// Its name and unit.
    pub name: String,
    /// Mean over the base's songs.
    pub base: f64,
    /// Mean over the tuned model's songs.
    pub tuned: f64,
}

/// One song of the evaluation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SongResult {
    /// Id of the prompt, or path of the file in its folder.
    pub id: String,
    /// The prompt, if there is one.
    pub caption: Option<String>,
}

impl Summary {
    /// The target's result.
    pub fn target(&self) -> &MetricResult {
        &self.metrics[0]
    }

    /// The table in Markdown, the warnings beneath it.
    pub fn to_markdown(&self) -> String {
        let (head, rows) = self.cells();
        let mut text = crate::report::Table { head, rows, ..Default::default() }.to_markdown();
        for warning in &self.warnings {
            text += &format!("\nWarning: {warning}.\n");
        }
        text
    }

    /// The table for a terminal.
    pub fn table(&self) -> String {
        let (head, rows) = self.cells();
        let mut text = crate::report::Table { head, rows, ..Default::default() }.to_text();
        for warning in &self.warnings {
            text += &format!("warning: {warning}\n");
        }
        text
    }

    /// Head and rows of the table of metrics and monitors.
    pub(super) fn cells(&self) -> (Vec<String>, Vec<Vec<String>>) {
        let head = [
            "metric",
            "better",
            "base",
            "tuned",
            "difference",
            "95 % of the difference",
            "songs won (95 %)",
            "sets won",
        ];
        let mut rows = Vec::new();
        for m in &self.metrics {
            let won = m.song_win_rate.as_ref().map_or("-".to_owned(), |w| {
                format!("{:.1} % ({:.1} to {:.1})", 100.0 * w.rate, 100.0 * w.lower, 100.0 * w.upper)
            });
            rows.push(vec![
                m.name.clone(),
                if m.lower_is_better { "lower" } else { "higher" }.to_owned(),
                number(m.base),
                number(m.tuned),
                format!("{:+}", Short(m.tuned - m.base)),
                format!("{:+} to {:+}", Short(m.difference_95.0), Short(m.difference_95.1)),
                won,
                format!("{:.1} %", 100.0 * m.set_win_rate),
            ]);
        }
        for m in &self.monitors {
            let difference = format!("{:+}", Short(m.tuned - m.base));
            let cells = [
                m.name.clone(),
                "-".into(),
                number(m.base),
                number(m.tuned),
                difference,
                "-".into(),
                "-".into(),
                "-".into(),
            ];
            rows.push(cells.into());
        }
        (head.map(str::to_owned).into(), rows)
    }
}

/// Four significant digits.
struct Short(f64);

impl std::fmt::Display for Short {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // What rounds to zero has no sign.
        let x = if self.0.abs() < 5e-7 { 0.0 } else { self.0 };
        let digits = match x {
            0.0 => 0,
            x => (3 - x.abs().log10().floor() as i32).clamp(0, 6) as usize,
        };
        if f.sign_plus() { write!(f, "{x:+.digits$}") } else { write!(f, "{x:.digits$}") }
    }
}

/// `value` in four significant digits.
pub(crate) fn number(value: f64) -> String {
    Short(value).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn four_digits_count_and_zero_has_no_sign() {
        let texts = [123_456.7, 70.694, -0.012344, 2e-6, -3e-10, 0.0].map(number);
        assert_eq!(texts, ["123457", "70.69", "-0.01234", "0.000002", "0", "0"]);
        assert_eq!(format!("{:+} {:+}", Short(1.0), Short(-1e-12)), "+1.000 +0");
    }
}
