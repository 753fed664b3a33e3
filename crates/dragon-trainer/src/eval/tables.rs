//! Evaluations side by side, in the layouts of the paper's tables.

use super::summary::{MetricResult, Summary, number};
use crate::report::Table;

/// Several evaluations in the layout of the paper's Table 1: a row for what was optimised, a column for each metric, in
/// the cell the win rate over the base in percent (of songs where the metric has a value of each, else of subsets) and, in
/// brackets, that of the row's own target. The last row has the mean of the targets.
pub fn win_rates(runs: &[(String, Summary)]) -> Table {
    let names = metric_names(runs, |_| true);
    let head = ["optimised", "prompts"].into_iter().chain(names.iter().copied()).map(str::to_owned).collect();
    let mut rows: Vec<Vec<String>> = runs
        .iter()
        .map(|(run, summary)| {
            let cells = names.iter().map(|name| match summary.metrics.iter().position(|m| m.name == *name) {
                None => "-".to_owned(),
                Some(0) => format!("[{:.1}]", rate(&summary.metrics[0])),
                Some(i) => format!("{:.1}", rate(&summary.metrics[i])),
            });
            [run.clone(), summary.n_songs.to_string()].into_iter().chain(cells).collect()
        })
        .collect();
    let targets: Vec<f64> = runs.iter().map(|(_, summary)| rate(summary.target())).collect();
    let mean = targets.iter().sum::<f64>() / targets.len().max(1) as f64;
    let mut last = vec!["-".to_owned(); names.len() + 2];
    (last[0], last[1]) = (format!("mean of the targets: [{mean:.1}]"), String::new());
    rows.push(last);
    let note = "Songs won over the base in percent, or sets of songs where a metric has no value of one song; in brackets: \
                the reward that was optimised.";
    Table { title: "Win rates (paper, Table 1)".into(), note: note.into(), head, rows }
}

/// Several evaluations in the layout of the paper's Tables 6 to 10 (appendix H): a row for the base and one for each run,
/// a column for each metric.
///
/// Tables 6 and 7 hold the metrics that have a value of each song: share of songs won, mean value. Tables 8 to 10 hold the
/// metrics of sets: share of subsets won, mean over the subsets, value of the whole set. A table without a metric is left
/// out.
pub fn appendix_tables(runs: &[(String, Summary)]) -> Vec<Table> {
    let of_songs = |m: &MetricResult| m.base_songs.is_some();
    let percent = |share: f64| format!("{:.1} %", 100.0 * share);
    let half = || percent(0.5);
    // Title, whether of songs, whether values (not shares won), the cells of the base and of the tuned model.
    type Cells<'a> = &'a dyn Fn(&MetricResult) -> (String, String);
    let layouts: [(&str, bool, bool, Cells); 5] = [
        ("Songs won over the base (paper, Table 6)", true, false, &|m| {
            (half(), m.song_win_rate.as_ref().map_or("-".into(), |won| percent(won.rate)))
        }),
        ("Mean over the songs (paper, Table 7)", true, true, &|m| (number(m.base), number(m.tuned))),
        ("Sets won over the base (paper, Table 8)", false, false, &|m| (half(), percent(m.set_win_rate))),
        ("Mean over the sets (paper, Table 9)", false, true, &|m| {
            (number(m.subset_means.0), number(m.subset_means.1))
        }),
        ("Whole set (paper, Table 10)", false, true, &|m| (number(m.base), number(m.tuned))),
    ];
    let mut tables = Vec::new();
    for (title, songs, values, cells) in layouts {
        let names = metric_names(runs, |m| of_songs(m) == songs);
        if names.is_empty() {
            continue;
        }
        let mut rows: Vec<Vec<String>> = Vec::new();
        let mut base: Option<Vec<String>> = None;
        for (run, summary) in runs {
            let (of_base, of_run): (Vec<String>, Vec<String>) = names
                .iter()
                .map(|name| {
                    let metric = summary.metrics.iter().find(|m| m.name == *name);
                    metric.map_or(("-".to_owned(), "-".to_owned()), cells)
                })
                .unzip();
            // Other prompts or other noise are another base.
            if base.as_ref() != Some(&of_base) {
                rows.push([vec![summary.base.clone()], of_base.clone()].concat());
                base = Some(of_base);
            }
            rows.push([vec![run.clone()], of_run].concat());
        }
        let lower: Vec<&str> = names.iter().copied().filter(|name| is_lower_better(runs, name)).collect();
        let note = match values && !lower.is_empty() {
            true => format!("Lower is better: {}.", lower.join("; ")),
            false => String::new(),
        };
        let head = ["model"].into_iter().chain(names.iter().copied()).map(str::to_owned).collect();
        tables.push(Table { title: title.into(), note, head, rows });
    }
    tables
}

/// Win rate over the base in percent: of songs, else of subsets.
fn rate(metric: &MetricResult) -> f64 {
    100.0 * metric.song_win_rate.as_ref().map_or(metric.set_win_rate, |won| won.rate)
}

/// Names of the metrics that `keep` takes, each once, sorted.
fn metric_names(runs: &[(String, Summary)], keep: impl Fn(&MetricResult) -> bool) -> Vec<&str> {
    let all = runs.iter().flat_map(|(_, summary)| &summary.metrics).filter(|metric| keep(metric));
    let names: std::collections::BTreeSet<&str> = all.map(|metric| metric.name.as_str()).collect();
    names.into_iter().collect()
}

fn is_lower_better(runs: &[(String, Summary)], name: &str) -> bool {
    runs.iter().flat_map(|(_, summary)| &summary.metrics).any(|m| m.name == name && m.lower_is_better)
}

#[cfg(test)]
mod tests {
    use dragon_metrics::{Better, win_rate};

    use super::*;

    fn metric(name: &str, set_win_rate: f64) -> MetricResult {
        MetricResult {
            name: name.into(),
            reward: String::new(),
            lower_is_better: name == "a",
            base: 4.0,
            tuned: 2.0,
            difference_95: (0.0, 0.0),
            song_win_rate: None,
            set_win_rate,
            subset_means: (5.0, 3.0),
            effect_size: None,
            base_songs: None,
            tuned_songs: None,
        }
    }

    fn summary(metrics: Vec<MetricResult>) -> Summary {
        Summary {
            base: "base".into(),
            tuned: String::new(),
            n_songs: 9,
            metrics,
            monitors: Vec::new(),
            warnings: Vec::new(),
            inputs_sha256: String::new(),
            songs: Vec::new(),
        }
    }

    fn of_songs(name: &str) -> MetricResult {
        let base = vec![0.5; 4];
        let tuned = vec![1.0, 1.0, 1.0, 0.0];
        MetricResult {
            song_win_rate: Some(win_rate(&tuned, &base, Better::Higher).unwrap()),
            base_songs: Some(base),
            tuned_songs: Some(tuned),
            ..metric(name, 0.1)
        }
    }

    #[test]
    fn the_table_of_win_rates_puts_the_target_in_brackets_and_averages_the_targets() {
        let runs = [
            ("x".into(), summary(vec![metric("a", 0.5), of_songs("b")])),
            ("y".into(), summary(vec![metric("c", 1.0)])),
        ];
        let table = win_rates(&runs);
        assert_eq!(table.head, ["optimised", "prompts", "a", "b", "c"]);
        assert_eq!(table.rows[0], ["x", "9", "[50.0]", "75.0", "-"]);
        assert_eq!(table.rows[1], ["y", "9", "-", "-", "[100.0]"]);
        assert_eq!(table.rows[2][0], "mean of the targets: [75.0]");
    }

    #[test]
    fn metrics_of_songs_and_of_sets_have_their_own_tables_under_one_base() {
        let other = MetricResult { base: 4.5, ..metric("a", 1.0) };
        let runs = [
            ("x".into(), summary(vec![metric("a", 0.5), of_songs("b")])),
            ("y".into(), summary(vec![metric("a", 0.25), of_songs("b")])),
            ("z".into(), summary(vec![other, of_songs("b")])),
        ];
        let tables = appendix_tables(&runs);
        let rows = |k: usize| tables[k].rows.iter().map(|row| row.join(" ")).collect::<Vec<_>>();
        assert_eq!(tables[0].head, ["model", "b"]);
        assert_eq!(rows(0), ["base 50.0 %", "x 75.0 %", "y 75.0 %", "z 75.0 %"]);
        assert_eq!(rows(1), ["base 4.000", "x 2.000", "y 2.000", "z 2.000"]);
        assert_eq!(tables[2].head, ["model", "a"]);
        assert_eq!(rows(2), ["base 50.0 %", "x 50.0 %", "y 25.0 %", "z 100.0 %"]);
        assert_eq!(rows(3), ["base 5.000", "x 3.000", "y 3.000", "z 3.000"]);
        assert_eq!(rows(4), ["base 4.000", "x 2.000", "y 2.000", "base 4.500", "z 2.000"]);
        assert_eq!([&tables[2].note[..], &tables[4].note], ["", "Lower is better: a."]);
        assert_eq!(appendix_tables(&[("x".into(), summary(vec![metric("a", 0.5)]))]).len(), 3);
    }
}
