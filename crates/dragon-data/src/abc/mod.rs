//! ABC notation (standard 2.1, the part that tune collections use) to notes.
//!
//! Read: notes, accidentals, lengths, chords, broken rhythm, tuplets, ties, rests, bar lines, repeats with endings,
//! key signatures with modes, changes of key, metre and unit length, the first voice. Passed over: ornaments, grace
//! notes, fingerings, annotations, chord symbols, lyrics, further voices. The parser never fails on odd text: what it
//! does not know it passes over; [`Tune::is_regular`] tells whether what came out is music to rely on.
//!
//! Reading order: tunes and [`parse`] are here; `key` has keys, modes and metres; `body` reads the music; `repeats` puts
//! its bars into playing order.

mod body;
mod key;
mod repeats;
#[cfg(test)]
mod tests;

pub use key::{Key, Meter, Mode};

use body::{Body, parse_length};
use repeats::{expand, join_halves};

/// Ticks per whole note: divisible by 128, 9, 5 and 7, so note lengths and tuplets stay exact.
pub const WHOLE: u32 = 40320;

/// A tune.
#[derive(Debug, Clone, PartialEq)]
pub struct Tune {
    /// Number of the tune in its file (`X:`).
    pub number: u32,
    /// First title (`T:`), as written.
    pub title: String,
    /// Kind of tune (`R:`), lower case; empty if not given.
    pub rhythm: String,
    /// Key at the start.
    pub key: Key,
    /// Metre at the start.
    pub meter: Meter,
    /// Bars in playing order, repeats written out; notes only inside.
    pub bars: Vec<Bar>,
}

/// One bar.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Bar {
    /// Notes by onset.
    pub notes: Vec<Note>,
    /// Length in ticks: sum of what was written, whatever the metre.
    pub length: u32,
}

/// One note.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Note {
    /// Onset in ticks after the bar's start.
    pub onset: u32,
    /// Length in ticks; may reach beyond the bar (ties).
    pub length: u32,
    /// MIDI pitch, 0 to 127; 60 is middle C (`C` in ABC).
    pub pitch: u8,
}

impl Tune {
    /// Whether the bars fit the metre well enough for accompaniment: at least eight whole bars, at least 80 % of the
    /// bars whole, every note within the range of common instruments.
    pub fn is_regular(&self) -> bool {
        let whole = self.bars.iter().filter(|b| b.length == self.meter.bar()).count();
        let notes = || self.bars.iter().flat_map(|b| &b.notes);
        whole >= 8
            && 5 * whole >= 4 * self.bars.len()
            && notes().count() >= 24
            && notes().all(|n| (48..=100).contains(&n.pitch) && n.length > 0)
    }
}

/// All tunes of an ABC file, in order. Tunes without a `K:` field or without notes are left out.
pub fn parse(text: &str) -> Vec<Tune> {
    let mut tunes = Vec::new();
    let mut lines: Vec<&str> = Vec::new();
    let mut flush = |lines: &mut Vec<&str>| {
        tunes.extend(parse_tune(lines));
        lines.clear();
    };
    for line in text.lines() {
        if line.starts_with("X:") && !lines.is_empty() {
            flush(&mut lines);
        }
        if line.starts_with("X:") || !lines.is_empty() {
            lines.push(line);
        }
    }
    flush(&mut lines);
    tunes
}

/// Parses the lines of one tune, `X:` first.
fn parse_tune(lines: &[&str]) -> Option<Tune> {
    let mut tune = Tune {
        number: 0,
        title: String::new(),
        rhythm: String::new(),
        key: Key::new(0, 0, Mode::Major),
        meter: Meter { over: 4, under: 4, cut: false },
        bars: Vec::new(),
    };
    let mut unit: Option<u32> = None;
    let mut body: Option<Body> = None;
    for line in lines {
        let line = line.trim_end();
        if line.starts_with('%') {
            continue;
        }
        if let Some((field, value)) = field_of(line) {
            match (&mut body, field) {
                (None, 'X') => tune.number = value.parse().unwrap_or(0),
                (None, 'T') if tune.title.is_empty() => tune.title = value.to_string(),
                (None, 'R') => tune.rhythm = value.to_lowercase(),
                (None, 'M') => tune.meter = Meter::parse(value).unwrap_or(tune.meter),
                (None, 'L') => unit = parse_length(value).or(unit),
                (None, 'K') => {
                    tune.key = Key::parse(value);
                    // standard 2.1: without L:, an eighth, or a sixteenth if the metre is below 3/4
                    let default = if 4 * tune.meter.over < 3 * tune.meter.under { 16 } else { 8 };
                    body = Some(Body::new(tune.key, unit.unwrap_or(WHOLE / default)));
                }
                (None, _) => {}
                (Some(body), field) => body.field(field, value),
            }
        } else if let Some(body) = &mut body {
            body.line(line);
        }
    }
    tune.bars = join_halves(expand(&body?.finish()), tune.meter.bar());
    if tune.bars.iter().all(|b| b.notes.is_empty()) {
        return None;
    }
    Some(tune)
}

fn field_of(line: &str) -> Option<(char, &str)> {
    let mut chars = line.chars();
    let field = chars.next().filter(|c| c.is_ascii_alphabetic())?;
    let value = chars.as_str().strip_prefix(':')?;
    // "|:" cannot start with a letter, but a note may stand before a repeat: "A:|" is music
    if value.starts_with('|') || value.starts_with(':') {
        return None;
    }
    Some((field, value.split('%').next().unwrap_or("").trim()))
}
