//! Self-contained HTML reports: tables, charts, players and spectrograms in one file that needs no network.
//!
//! `mod.rs` holds the data and lays out the page, `svg.rs` draws charts, `spectrogram.rs` pictures of sound.

mod spectrogram;
mod svg;

use std::fmt::Write as _;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Serialize;

use crate::error::Result;
use crate::run::write_atomic;

/// A report as data; [`Report::to_html`] makes the page.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// Heading of the page.
    pub title: String,
    /// One or two sentences below the heading: the result in words.
    pub lead: String,
    /// Names and values, for instance the command, seed and date.
    pub facts: Vec<(String, String)>,
    /// Tables, in order.
    pub tables: Vec<Table>,
    /// Charts, in order.
    pub charts: Vec<Chart>,
    /// Examples to listen to.
    pub songs: Vec<Song>,
    /// Tables at the end of the page: the same numbers in another layout, say.
    pub appendix: Vec<Table>,
}

/// A table; cells are plain text.
#[derive(Debug, Clone, Default)]
pub struct Table {
    /// Heading.
    pub title: String,
    /// A sentence on how to read it; may be empty.
    pub note: String,
    /// Column names.
    pub head: Vec<String>,
    /// Rows of as many cells as `head`; the first cell names the row.
    pub rows: Vec<Vec<String>>,
}

impl Table {
    /// Head and rows as a Markdown table.
    pub fn to_markdown(&self) -> String {
        let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
        let rule = vec!["---".to_owned(); self.head.len()];
        [&self.head, &rule].into_iter().chain(&self.rows).map(|row| line(row)).collect()
    }

    /// Head and rows for a terminal, columns aligned.
    pub fn to_text(&self) -> String {
        let all: Vec<&Vec<String>> = std::iter::once(&self.head).chain(&self.rows).collect();
        let width = |c: usize| all.iter().filter_map(|row| row.get(c)).map(|cell| cell.chars().count()).max();
        let mut out = String::new();
        for row in &all {
            let mut line = String::new();
            for (c, cell) in row.iter().enumerate() {
                let pad = " ".repeat(width(c).unwrap_or(0) - cell.chars().count());
                line.push_str(&if c == 0 { format!("{cell}{pad}") } else { format!("  {pad}{cell}") });
            }
            out.push_str(line.trim_end());
            out.push('\n');
        }
        out
    }
}

/// A named curve or sample.
#[derive(Debug, Clone, Default)]
pub struct Series {
    /// Its name in the legend.
    pub name: String,
    /// Points (x, y); those that are not finite are left out.
    pub points: Vec<(f64, f64)>,
}

/// A chart.
#[derive(Debug, Clone)]
pub enum Chart {
    /// Curves over a common axis.
    Lines {
        /// Heading.
        title: String,
        /// Name and unit of the horizontal axis.
        x_label: String,
        /// Name and unit of the vertical axis.
        y_label: String,
        /// The curves.
        series: Vec<Series>,
        /// Whether the vertical axis is logarithmic; values not above 0 are then left out.
        log_y: bool,
    },
    /// Distributions over a common axis, in common bins.
    Histogram {
        /// Heading.
        title: String,
        /// Name and unit of the horizontal axis.
        x_label: String,
        /// Name and values of each distribution.
        series: Vec<(String, Vec<f64>)>,
    },
    /// Named points in the plane; the first set is drawn on top.
    Points {
        /// Heading.
        title: String,
        /// Name and unit of the horizontal axis.
        x_label: String,
        /// Name and unit of the vertical axis.
        y_label: String,
        /// Name and points of each set.
        series: Vec<(String, Vec<Point>)>,
    },
}

/// A point with a name, which a pointer over it shows.
#[derive(Debug, Clone, Default)]
pub struct Point {
    /// Along the horizontal axis; not drawn unless finite, as the other.
    pub x: f64,
    /// Along the vertical axis.
    pub y: f64,
    /// Its name.
    pub label: String,
}

/// One prompt and what was made of it.
#[derive(Debug, Clone, Default)]
pub struct Song {
    /// The prompt.
    pub caption: String,
    /// The takes to compare, side by side.
    pub takes: Vec<Take>,
}

/// One piece of audio.
#[derive(Debug, Clone, Default)]
pub struct Take {
    /// Who made it, for instance `base`.
    pub label: String,
    /// Mono samples in [-1, 1]; beyond that they are clipped.
    pub samples: Vec<f32>,
    /// Samples per second.
    pub sample_rate_hz: u32,
    /// Its score or the like; may be empty.
    pub note: String,
}

const STYLE: &str = "\
:root{color-scheme:light dark;--ink:#1b1d22;--dim:#5d6470;--line:#d9dde4;--paper:#fff;--soft:#f4f6f9;\
--s0:#5b6b8c;--s1:#d1495b;--s2:#2a9d8f;--s3:#e0a030;--s4:#7b5ea7;--s5:#3f88c5}\
@media(prefers-color-scheme:dark){:root{--ink:#e6e8ec;--dim:#9aa3b2;--line:#363b45;--paper:#16181d;--soft:#1f2229;\
--s0:#93a5c9;--s1:#f07a88;--s2:#57c7b8;--s3:#f0bd5b;--s4:#a98fd6;--s5:#7ab4e6}}\
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}\
main{max-width:1080px;margin:0 auto;padding:32px 20px 64px}h1{font-size:28px;margin:0 0 8px;line-height:1.2}\
h2{font-size:19px;margin:36px 0 8px}.lead{font-size:18px;margin:0 0 20px}.note{color:var(--dim);margin:0 0 10px}\
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 18px;margin:0;font-size:14px}dt{color:var(--dim)}\
dd{margin:0;overflow-wrap:anywhere;font-family:ui-monospace,monospace}.scroll{overflow-x:auto}\
table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums;min-width:50%}\
th,td{padding:5px 12px;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}\
th:first-child,td:first-child{text-align:left;padding-left:0}th{color:var(--dim);font-weight:600}\
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(460px,100%),1fr));gap:12px 28px}\
figure{margin:0}figcaption{font-weight:600;margin:14px 0 4px}svg{width:100%;height:auto;display:block}\
svg text{fill:var(--dim);font:12px system-ui,sans-serif}.grid{stroke:var(--line)}.axis{stroke:var(--dim)}\
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;font-size:13px;color:var(--dim)}.legend i{display:inline-block;\
width:12px;height:12px;border-radius:3px;margin-right:6px;vertical-align:-1px}\
.song{background:var(--soft);border-radius:10px;padding:14px 16px;margin:0 0 14px}.song p{margin:0 0 10px;font-weight:600}\
.takes{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(300px,100%),1fr));gap:14px}\
.takes img{width:100%;height:150px;image-rendering:auto;border-radius:6px;display:block;object-fit:fill}\
.takes audio{width:100%;height:36px;margin-top:6px}.takes b{font-weight:600}.takes span{color:var(--dim);font-size:14px}";

impl Report {
    /// The page, as one HTML file.
    pub fn to_html(&self) -> String {
        let mut page = String::new();
        let title = escape(&self.title);
        let _ = write!(
            page,
            "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">\
             <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\
             <title>{title}</title><style>{STYLE}</style></head><body><main><h1>{title}</h1>"
        );
        if !self.lead.is_empty() {
            let _ = write!(page, "<p class=\"lead\">{}</p>", escape(&self.lead));
        }
        if !self.facts.is_empty() {
            page.push_str("<dl>");
            for (name, value) in &self.facts {
                let _ = write!(page, "<dt>{}</dt><dd>{}</dd>", escape(name), escape(value));
            }
            page.push_str("</dl>");
        }
        for table in &self.tables {
            table.write(&mut page);
        }
        if !self.charts.is_empty() {
            page.push_str("<h2>Curves and distributions</h2><div class=\"charts\">");
            for chart in &self.charts {
                svg::chart(&mut page, chart);
            }
            page.push_str("</div>");
        }
        if !self.songs.is_empty() {
            page.push_str(
                "<h2>Listen</h2><p class=\"note\">Mel spectrograms: time to the right, pitch upwards, \
                 80 dB from dark to bright.</p>",
            );
            for song in &self.songs {
                song.write(&mut page);
            }
        }
        for table in &self.appendix {
            table.write(&mut page);
        }
        page.push_str("</main></body></html>\n");
        page
    }

    /// Writes the page to `path`, whole or not at all.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        write_atomic(path, self.to_html().as_bytes())
    }
}

impl Table {
    fn write(&self, page: &mut String) {
        let _ = write!(page, "<section><h2>{}</h2>", escape(&self.title));
        if !self.note.is_empty() {
            let _ = write!(page, "<p class=\"note\">{}</p>", escape(&self.note));
        }
        page.push_str("<div class=\"scroll\"><table><thead><tr>");
        for cell in &self.head {
            let _ = write!(page, "<th>{}</th>", escape(cell));
        }
        page.push_str("</tr></thead><tbody>");
        for row in &self.rows {
            page.push_str("<tr>");
            for cell in row {
                let _ = write!(page, "<td>{}</td>", escape(cell));
            }
            page.push_str("</tr>");
        }
        page.push_str("</tbody></table></div></section>");
    }
}

impl Song {
    fn write(&self, page: &mut String) {
        let _ = write!(page, "<div class=\"song\"><p>{}</p><div class=\"takes\">", escape(&self.caption));
        for take in &self.takes {
            let picture = spectrogram::png(&take.samples, take.sample_rate_hz);
            let _ = write!(
                page,
                "<div><b>{}</b> <span>{}</span><img alt=\"mel spectrogram\" src=\"data:image/png;base64,{}\">\
                 <audio controls preload=\"none\" src=\"data:audio/wav;base64,{}\"></audio></div>",
                escape(&take.label),
                escape(&take.note),
                BASE64.encode(picture),
                BASE64.encode(wav16(&take.samples, take.sample_rate_hz)),
            );
        }
        page.push_str("</div></div>");
    }
}

/// A part of a config as presets write it: `{ solver = "dpmpp_2m", n_steps = 40 }`.
pub(crate) fn as_in_config(part: &impl Serialize) -> String {
    let mut text = String::new();
    match part.serialize(toml::ser::ValueSerializer::new(&mut text)) {
        Ok(_) => text,
        Err(err) => err.to_string(),
    }
}

/// A mono 16-bit WAV file in memory; samples beyond [-1, 1] are clipped.
fn wav16(samples: &[f32], sample_rate_hz: u32) -> Vec<u8> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    let spec = hound::WavSpec {
        channels: 1,
        sample_rate: sample_rate_hz,
        bits_per_sample: 16,
        sample_format: hound::SampleFormat::Int,
    };
    let mut writer = hound::WavWriter::new(&mut bytes, spec).expect("16-bit mono is a valid format");
    for &sample in samples {
        let value = (f64::from(sample).clamp(-1.0, 1.0) * 32767.0).round() as i16;
        writer.write_sample(value).expect("writing to memory succeeds");
    }
    writer.finalize().expect("writing to memory succeeds");
    bytes.into_inner()
}

/// Text as HTML shows it.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_a_config_reads_as_in_a_preset() {
        let setting =
            dragon_encoders::Setting::Fadtk { hop_s: 0.256, tail: dragon_encoders::Tail::WholeWindows };
        assert_eq!(as_in_config(&setting), r#"{ kind = "fadtk", hop_s = 0.256, tail = "whole_windows" }"#);
    }

    #[test]
    fn a_page_holds_its_parts_and_nothing_from_outside() {
        let tone: Vec<f32> = (0..16_000).map(|i| (i as f32 * 0.2).sin() * 0.5).collect();
        let report = Report {
            title: "A <tuned> model".into(),
            lead: "It wins.".into(),
            facts: vec![("seed".into(), "7".into())],
            tables: vec![Table {
                title: "Rewards".into(),
                head: vec!["metric".into(), "base".into()],
                rows: vec![vec!["FAD".into(), "1.5".into()]],
                ..Table::default()
            }],
            charts: vec![
                Chart::Lines {
                    title: "Loss".into(),
                    x_label: "step".into(),
                    y_label: "loss".into(),
                    series: vec![Series {
                        name: "kto".into(),
                        points: vec![(0.0, 0.5), (1.0, f64::NAN), (2.0, 0.4)],
                    }],
                    log_y: false,
                },
                Chart::Histogram {
                    title: "Reward".into(),
                    x_label: "reward".into(),
                    series: vec![("base".into(), vec![1.0, 2.0, 2.5]), ("tuned".into(), vec![2.0, 3.0])],
                },
                Chart::Points {
                    title: "Map".into(),
                    x_label: "axis 1".into(),
                    y_label: "axis 2".into(),
                    series: vec![(
                        "base".into(),
                        vec![
                            Point { x: 1.0, y: 2.0, label: "a<b>.wav".into() },
                            Point { x: f64::NAN, y: 0.0, label: "nowhere".into() },
                        ],
                    )],
                },
            ],
            songs: vec![Song {
                caption: "a \"slow\" reel".into(),
                takes: vec![Take {
                    label: "base".into(),
                    samples: tone,
                    sample_rate_hz: 16_000,
                    note: String::new(),
                }],
            }],
            appendix: vec![Table { title: "Rewards again".into(), ..Table::default() }],
        };
        let page = report.to_html();
        assert!(page.find("reel").unwrap() < page.find("Rewards again").unwrap());
        for part in [
            "A &lt;tuned&gt; model",
            "<td>1.5</td>",
            "<polyline",
            "<rect",
            "<circle",
            "<title>a&lt;b&gt;.wav</title>",
            "data:audio/wav",
            "a &quot;slow&quot; reel",
        ] {
            assert!(page.contains(part), "{part}");
        }
        assert!(!page.contains("http"), "the page asks for something from outside");
        assert!(!page.contains("nowhere"), "a point that is not finite was drawn");
        assert!(!page.contains("NaN"), "a value that is not finite reached the page");
    }

    #[test]
    fn a_report_without_anything_is_still_a_page() {
        let chart = Chart::Lines {
            title: "empty".into(),
            x_label: String::new(),
            y_label: String::new(),
            series: vec![],
            log_y: true,
        };
        let page = Report { charts: vec![chart], ..Report::default() }.to_html();
        assert!(page.contains("no values") && page.ends_with("</html>\n"));
    }

    #[test]
    fn a_wav_in_memory_reads_back() {
        let samples = [0.0, 0.5, -1.0, 2.0];
        let bytes = wav16(&samples, 8000);
        let mut reader = hound::WavReader::new(&bytes[..]).unwrap();
        let read: Vec<i16> = reader.samples().map(|s| s.unwrap()).collect();
        assert_eq!(read, [0, 16384, -32767, 32767]);
    }
}
