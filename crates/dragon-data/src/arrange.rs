//! A tune as an arrangement for General MIDI instruments: seeded choices of instrument, accompaniment, tempo,
//! transposition and register, and the notes of a 5.12 s excerpt that starts at a bar.

use serde::Serialize;

use crate::abc::{Bar, Key, Meter, Mode, Tune};
use crate::clips::CLIP_S;
use crate::rng::Choices;

/// A melody instrument.
#[derive(Debug, PartialEq, Eq)]
pub struct Instrument {
    /// Name used in captions.
    pub name: &'static str,
    /// General MIDI program, from 0.
    pub program: u8,
    /// Lowest and highest MIDI pitch at which it sounds like itself.
    pub range: (u8, u8),
}

const fn instrument(name: &'static str, program: u8, lowest: u8, highest: u8) -> Instrument {
    Instrument { name, program, range: (lowest, highest) }
}

/// Melody instruments: few enough to learn, far enough apart to hear.
pub const PALETTE: [Instrument; 18] = [
    instrument("piano", 0, 40, 100),
    instrument("harpsichord", 6, 43, 89),
    instrument("music box", 10, 60, 100),
    instrument("marimba", 12, 48, 91),
    instrument("church organ", 19, 43, 96),
    instrument("accordion", 21, 53, 93),
    instrument("acoustic guitar", 24, 43, 84),
    instrument("distorted electric guitar", 30, 43, 84),
    instrument("violin", 40, 55, 100),
    instrument("cello", 42, 38, 74),
    instrument("trumpet", 56, 54, 86),
    instrument("saxophone", 65, 50, 83),
    instrument("flute", 73, 60, 98),
    instrument("chiptune square synth", 80, 48, 96),
    instrument("saw synth", 81, 45, 91),
    instrument("sitar", 104, 48, 79),
    instrument("banjo", 105, 50, 86),
    instrument("steel drums", 114, 55, 91),
];

/// What sounds beside the melody.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Accompaniment {
    /// Nothing.
    None,
    /// Tonic and fifth, held.
    Drone,
    /// Chords on one instrument.
    Chords,
    /// Chords and a bass.
    BassAndChords,
    /// A drum kit.
    Drums,
    /// Bass, chords and drums.
    Band,
}

/// How often each accompaniment is chosen.
const ACCOMPANIMENTS: [(f64, Accompaniment); 6] = [
    (0.28, Accompaniment::None),
    (0.13, Accompaniment::Drone),
    (0.20, Accompaniment::Chords),
    (0.15, Accompaniment::BassAndChords),
    (0.10, Accompaniment::Drums),
    (0.14, Accompaniment::Band),
];

/// Chord instruments: caption name and General MIDI program.
const CHORD_INSTRUMENTS: [(&str, u8); 6] =
    [("piano", 0), ("guitar", 25), ("strings", 48), ("organ", 16), ("harp", 46), ("synth pad", 89)];

/// How chords are played.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ChordStyle {
    /// Held until the harmony changes.
    Held,
    /// Struck on each beat.
    Beats,
    /// Struck between the beats.
    OffBeats,
    /// One note after another.
    Arpeggio,
}

impl ChordStyle {
    fn for_program(program: u8, choices: &mut Choices) -> Self {
        match program {
            48 | 89 => ChordStyle::Held,
            16 => *choices.pick(&[ChordStyle::Held, ChordStyle::OffBeats]),
            46 => *choices.pick(&[ChordStyle::Arpeggio, ChordStyle::Beats]),
            _ => *choices.pick(&[ChordStyle::Beats, ChordStyle::OffBeats, ChordStyle::Arpeggio]),
        }
    }
}

/// Tempo class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Tempo {
    /// 44 to 66 beats per minute.
    Slow,
    /// 76 to 100.
    Medium,
    /// 112 to 144.
    Fast,
}

impl Tempo {
    fn range(self) -> (f64, f64) {
        match self {
            Tempo::Slow => (44.0, 66.0),
            Tempo::Medium => (76.0, 100.0),
            Tempo::Fast => (112.0, 144.0),
        }
    }
}

/// Where the melody lies, by its mean pitch in the excerpt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Register {
    /// Below G3 + 2 (MIDI 57).
    Low,
    /// Between.
    Middle,
    /// Above D5 (MIDI 74).
    High,
}

/// What is heard in an excerpt; captions are made of these and nothing else.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Facts {
    /// Melody instrument.
    pub instrument: &'static str,
    /// Its General MIDI program, from 0.
    pub program: u8,
    /// What sounds beside it.
    pub accompaniment: Accompaniment,
    /// Instrument of the chords, if there are chords.
    pub chord_instrument: Option<&'static str>,
    /// How they are played.
    pub chord_style: Option<ChordStyle>,
    /// Felt beats per minute.
    pub tempo_bpm: u32,
    /// Its class.
    pub tempo: Tempo,
    /// Key as it sounds, "D major".
    pub key: String,
    /// Mode of the key.
    pub mode: &'static str,
    /// Kind of tune, if the source names it.
    pub tune_type: Option<&'static str>,
    /// Metre, "6/8".
    pub meter: String,
    /// Whether the metre is in three (3/4, 3/8).
    pub triple: bool,
    /// Whether its beats divide by three (6/8, 9/8, 12/8).
    pub compound: bool,
    /// Where the melody lies.
    pub register: Register,
    /// Semitones from the notation, octaves included.
    pub transposition: i32,
    /// First bar of the excerpt, from 0, repeats written out.
    pub start_bar: usize,
}

/// A note for the synthesiser.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sounding {
    /// MIDI channel; 9 is the drum kit.
    pub channel: u8,
    /// MIDI pitch, or drum.
    pub key: u8,
    /// MIDI velocity, 1 to 127.
    pub velocity: u8,
    /// Onset, seconds after the excerpt's start.
    pub on_s: f64,
    /// Release, seconds after the excerpt's start.
    pub off_s: f64,
}

/// An arranged excerpt.
#[derive(Debug, Clone, PartialEq)]
pub struct Arrangement {
    /// What is heard.
    pub facts: Facts,
    /// Program and volume (0 to 127) of each channel in use; the drum kit (9) too.
    pub channels: Vec<(u8, u8, u8)>,
    /// The notes, by onset.
    pub notes: Vec<Sounding>,
    /// Start of the excerpt in the tune, seconds.
    pub start_s: f64,
}

/// Channels, fixed by part.
const MELODY: u8 = 0;
const CHORDS: u8 = 1;
const BASS: u8 = 2;
const DRONE: u8 = 3;
const KIT: u8 = 9;

/// Arranges an excerpt of a regular tune; `None` if the choices leave no excerpt of 5.12 s within the instrument's range.
pub fn arrange(tune: &Tune, choices: &mut Choices) -> Option<Arrangement> {
    let instrument = choices.pick(&PALETTE);
    let accompaniment = *choices.pick_weighted(&ACCOMPANIMENTS);
    let tempo = *choices.pick_weighted(&[(0.32, Tempo::Slow), (0.36, Tempo::Medium), (0.32, Tempo::Fast)]);
    let tempo_bpm = choices.between(tempo.range().0, tempo.range().1 + 1.0).floor();
    let second_per_tick = 60.0 / (tempo_bpm * f64::from(tune.meter.beat()));

    // starts and lengths of bars
    let starts: Vec<u32> = tune
        .bars
        .iter()
        .scan(0u32, |at, bar| {
            let start = *at;
            *at += bar.length;
            Some(start)
        })
        .collect();
    let total = starts.last()? + tune.bars.last()?.length;
    let ticks = (CLIP_S / second_per_tick).ceil() as u32;
    let candidates: Vec<usize> = (0..tune.bars.len())
        .filter(|&i| tune.bars[i].length == tune.meter.bar() && starts[i] + ticks <= total)
        .filter(|&i| !tune.bars[i].notes.is_empty())
        .collect();
    if candidates.is_empty() {
        return None;
    }
    let start_bar = *choices.pick(&candidates);
    let (from, to) = (starts[start_bar], starts[start_bar] + ticks);
    let inside: Vec<(usize, &Bar)> = tune
        .bars
        .iter()
        .enumerate()
        .filter(|(i, b)| starts[*i] < to && starts[*i] + b.length > from)
        .collect();

    // transposition: a key, then an octave within the instrument's range
    let key_shift = choices.below(12) as i32 - 5;
    let melody: Vec<u8> = inside.iter().flat_map(|(_, b)| b.notes.iter().map(|n| n.pitch)).collect();
    let (low, high) = (i32::from(*melody.iter().min()?), i32::from(*melody.iter().max()?));
    let octaves: Vec<i32> = (-3..=2)
        .map(|octave| key_shift + 12 * octave)
        .filter(|s| low + s >= i32::from(instrument.range.0) && high + s <= i32::from(instrument.range.1))
        .collect();
    if octaves.is_empty() {
        return None;
    }
    let transposition = *choices.pick(&octaves);
    let tonic = (i32::from(tune.key.tonic) + transposition).rem_euclid(12) as u8;
    let mean =
        melody.iter().map(|&p| f64::from(p)).sum::<f64>() / melody.len() as f64 + f64::from(transposition);
    let register = match mean {
        m if m < 57.0 => Register::Low,
        m if m > 74.0 => Register::High,
        _ => Register::Middle,
    };

    let mut score = Score { notes: Vec::new(), from, second_per_tick };
    for (i, bar) in &inside {
        for note in &bar.notes {
            let onset = starts[*i] + note.onset;
            let on_beat = note.onset % tune.meter.beat() == 0;
            let velocity = if note.onset == 0 {
                104
            } else if on_beat {
                98
            } else {
                90
            };
            let key = (i32::from(note.pitch) + transposition) as u8;
            let jitter = choices.below(9) as u8;
            score.add(MELODY, key, velocity - 4 + jitter, onset, note.length * 19 / 20);
        }
    }

    let mut channels = vec![(MELODY, instrument.program, 110)];
    let has_chords =
        matches!(accompaniment, Accompaniment::Chords | Accompaniment::BassAndChords | Accompaniment::Band);
    let has_bass = matches!(accompaniment, Accompaniment::BassAndChords | Accompaniment::Band);
    let has_drums = matches!(accompaniment, Accompaniment::Drums | Accompaniment::Band);
    // chosen whether used or not, so that one choice does not move the others; never the melody's own kind
    let others: Vec<_> =
        CHORD_INSTRUMENTS.iter().filter(|(name, _)| !instrument.name.contains(name)).collect();
    let (chord_name, chord_program) = **choices.pick(&others);
    let style = ChordStyle::for_program(chord_program, choices);
    let bass_program = *choices.pick(&[32u8, 33, 38]);
    let pattern = choices.below(3);

    if accompaniment == Accompaniment::Drone {
        let program = *choices.pick(&[109u8, 48, 16]);
        channels.push((DRONE, program, 62));
        let root = 36 + tonic; // C2 to B2
        for key in [root, root + 7, root + 12] {
            score.add(DRONE, key, 80, from, to - from);
        }
    }
    if has_chords {
        channels.push((CHORDS, chord_program, 78));
    }
    if has_bass {
        channels.push((BASS, bass_program, 92));
    }
    if has_drums {
        channels.push((KIT, 0, 88));
    }
    let beat = tune.meter.beat();
    // cut time and common time change harmony with each of their two beats, other metres with the bar
    let span = if tune.meter.over == 4 && tune.meter.under == 4 { beat } else { tune.meter.bar() };
    for (i, bar) in &inside {
        if bar.length != tune.meter.bar() {
            continue; // an incomplete bar has no accompaniment
        }
        for at in (0..bar.length).step_by(span as usize) {
            let chord = harmonise(&tune.key, bar, at, span);
            let onset = starts[*i] + at;
            let root = (i32::from(chord[0]) + transposition).rem_euclid(12) as u8;
            if has_chords {
                let voices: Vec<u8> = chord
                    .iter()
                    .map(|&c| 53 + (i32::from(c) + transposition - 53).rem_euclid(12) as u8)
                    .collect();
                score.chord(&voices, onset, span, beat, style, tune.meter.is_compound());
            }
            if has_bass {
                let key = 36 + (i32::from(root) - 36).rem_euclid(12) as u8;
                for (n, b) in (0..span).step_by(beat as usize).enumerate() {
                    let fifth = if n % 2 == 1 { 7 } else { 0 };
                    let key = if key + fifth > 48 { key + fifth - 12 } else { key + fifth };
                    score.add(BASS, key, 92, onset + b, beat * 4 / 5);
                }
            }
        }
        if has_drums {
            score.drums(starts[*i], &tune.meter, pattern);
        }
    }
    score
        .notes
        .sort_by(|a, b| a.on_s.total_cmp(&b.on_s).then(a.channel.cmp(&b.channel)).then(a.key.cmp(&b.key)));

    Some(Arrangement {
        facts: Facts {
            instrument: instrument.name,
            program: instrument.program,
            accompaniment,
            chord_instrument: has_chords.then_some(chord_name),
            chord_style: has_chords.then_some(style),
            tempo_bpm: tempo_bpm as u32,
            tempo,
            key: Key::name(tonic, tune.key.mode),
            mode: tune.key.mode.name(),
            tune_type: tune_type(tune),
            meter: tune.meter.name(),
            triple: tune.meter.over == 3,
            compound: tune.meter.is_compound(),
            register,
            transposition,
            start_bar,
        },
        channels,
        notes: score.notes,
        start_s: f64::from(from) * second_per_tick,
    })
}

/// Notes of an excerpt, in seconds.
struct Score {
    notes: Vec<Sounding>,
    /// Start of the excerpt, ticks.
    from: u32,
    second_per_tick: f64,
}

impl Score {
    /// Adds a note that starts inside the excerpt; others are dropped.
    fn add(&mut self, channel: u8, key: u8, velocity: u8, onset: u32, length: u32) {
        if onset < self.from {
            return;
        }
        let on_s = f64::from(onset - self.from) * self.second_per_tick;
        if on_s < CLIP_S {
            let off_s = on_s + f64::from(length.max(1)) * self.second_per_tick;
            self.notes.push(Sounding { channel, key, velocity, on_s, off_s });
        }
    }

    /// A chord for `span` ticks.
    fn chord(&mut self, voices: &[u8], onset: u32, span: u32, beat: u32, style: ChordStyle, compound: bool) {
        let parts = if compound { 3 } else { 2 }; // pulses of a beat
        match style {
            ChordStyle::Held => {
                for &key in voices {
                    self.add(CHORDS, key, 78, onset, span * 19 / 20);
                }
            }
            ChordStyle::Beats | ChordStyle::OffBeats => {
                let late = if style == ChordStyle::OffBeats { beat / parts * (parts - 1) } else { 0 };
                for b in (0..span).step_by(beat as usize) {
                    let length = if late > 0 { (beat - late) * 3 / 4 } else { beat * 7 / 10 };
                    for &key in voices {
                        self.add(CHORDS, key, 80, onset + b + late, length);
                    }
                }
            }
            ChordStyle::Arpeggio => {
                let mut up = voices.to_vec();
                up.sort_unstable();
                let step = beat / parts;
                for (n, b) in (0..span).step_by(step as usize).enumerate() {
                    self.add(CHORDS, up[n % up.len()], 82, onset + b, step);
                }
            }
        }
    }

    /// One bar of drums: bass drum and snare in turn on the beats, a cymbal on the pulses.
    fn drums(&mut self, onset: u32, meter: &Meter, pattern: usize) {
        const BASS_DRUM: u8 = 36;
        const SNARE: u8 = 38;
        const CLOSED_HAT: u8 = 42;
        const RIDE: u8 = 51;
        let beat = meter.beat();
        let n_beats = meter.bar() / beat;
        let pulses = if meter.is_compound() || meter.over == 3 && meter.under == 8 { 3 } else { 2 };
        let mut hit = |key, velocity, at| self.add(KIT, key, velocity, onset + at, beat / 4);
        for b in 0..n_beats {
            let at = b * beat;
            let down = if n_beats == 3 { b == 0 } else { b % 2 == 0 };
            if down {
                hit(BASS_DRUM, 104, at);
            } else if !(n_beats == 3 && b == 1 && pattern == 1) {
                hit(SNARE, 92, at);
            }
            if pattern == 2 {
                hit(BASS_DRUM, 84, at + beat / pulses * (pulses - 1));
            }
            let cymbal = if pattern == 1 { RIDE } else { CLOSED_HAT };
            for p in 0..pulses {
                hit(cymbal, if p == 0 { 80 } else { 66 }, at + beat / pulses * p);
            }
        }
    }
}

/// The triad (pitch classes as notated, root first) that fits a bar's notes from `at` for `span` ticks best.
fn harmonise(key: &Key, bar: &Bar, at: u32, span: u32) -> [u8; 3] {
    // preferred degrees, from 0: tonic, subdominant, dominant or the mode's typical neighbour, then the rest
    let preferred: &[(usize, f64)] = match key.mode {
        Mode::Major | Mode::Lydian => &[(0, 0.30), (4, 0.22), (3, 0.20), (5, 0.05), (1, 0.0)],
        Mode::Mixolydian => &[(0, 0.30), (6, 0.22), (3, 0.18), (4, 0.05)],
        Mode::Dorian => &[(0, 0.30), (6, 0.22), (3, 0.12), (2, 0.08)],
        _ => &[(0, 0.30), (6, 0.18), (2, 0.10), (3, 0.10), (5, 0.08)],
    };
    let scale = key.mode.scale();
    let triad = |degree: usize| [0, 2, 4].map(|third| (key.tonic + scale[(degree + third) % 7]) % 12);
    let score = |degree: usize, bonus: f64| {
        let chord = triad(degree);
        let mut total = bonus * f64::from(span);
        for note in &bar.notes {
            let (start, end) = (note.onset.max(at), (note.onset + note.length).min(at + span));
            if start < end {
                let weight = f64::from(end - start) * if note.onset == at { 1.5 } else { 1.0 };
                total += if chord.contains(&(note.pitch % 12)) { weight } else { -0.6 * weight };
            }
        }
        total
    };
    let best = preferred
        .iter()
        .map(|&(degree, bonus)| (degree, score(degree, bonus)))
        .max_by(|a, b| a.1.total_cmp(&b.1))
        .expect("every mode has preferred degrees");
    triad(best.0)
}

/// Kind of tune named by `R:` or the title.
fn tune_type(tune: &Tune) -> Option<&'static str> {
    const TYPES: [(&str, &str); 16] = [
        ("slip jig", "slip jig"),
        ("slipjig", "slip jig"),
        ("highland fling", "highland fling"),
        ("fling", "highland fling"),
        ("hornpipe", "hornpipe"),
        ("strathspey", "strathspey"),
        ("reel", "reel"),
        ("jig", "jig"),
        ("clog", "clog dance"),
        ("walkaround", "walkaround"),
        ("quick step", "quickstep"),
        ("quickstep", "quickstep"),
        ("march", "march"),
        ("minuet", "minuet"),
        ("waltz", "waltz"),
        ("gavotte", "gavotte"),
    ];
    let find = |text: &str| {
        let words: String =
            text.to_lowercase().chars().map(|c| if c.is_alphabetic() { c } else { ' ' }).collect();
        let words = format!(" {} ", words.split_whitespace().collect::<Vec<_>>().join(" "));
        TYPES.iter().find(|(kind, _)| words.contains(&format!(" {kind} "))).map(|(_, name)| *name)
    };
    find(&tune.rhythm).or_else(|| find(&tune.title))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abc::parse;

    fn tune(meter: &str) -> Tune {
        let body = match meter {
            "6/8" => "GAB cde|d2B G3|ABc dcB|A3 G3|".repeat(6),
            "3/4" => "G2 B2 d2|e2 d2 B2|c2 A2 F2|G6|".repeat(6),
            _ => "GABc dedB|c2A2 A2GA|B2d2 d2cB|ABcA G4|".repeat(6),
        };
        parse(&format!("X:1\nT:A Test -- Reel\nM:{meter}\nL:1/8\nK:G\n{body}\n")).remove(0)
    }

    fn arrangements(meter: &str) -> Vec<Arrangement> {
        let tune = tune(meter);
        (0..300).filter_map(|i| arrange(&tune, &mut Choices::new(5, &format!("{i}")))).collect()
    }

    #[test]
    fn facts_agree_with_the_notes() {
        for meter in ["C|", "4/4", "6/8", "3/4"] {
            let all = arrangements(meter);
            assert!(all.len() > 200, "{meter}: {}", all.len());
            for Arrangement { facts, notes, channels, .. } in all {
                let instrument = PALETTE.iter().find(|i| i.name == facts.instrument).unwrap();
                let melody: Vec<&Sounding> = notes.iter().filter(|n| n.channel == MELODY).collect();
                assert!(melody.iter().all(|n| (instrument.range.0..=instrument.range.1).contains(&n.key)));
                assert_eq!(melody[0].on_s, 0.0, "an excerpt starts at a bar");
                // G A B c are the tonic's own notes after transposition
                let tonic = (67 + facts.transposition).rem_euclid(12);
                assert!(facts.key.starts_with(Key::name(tonic as u8, Mode::Major).as_str()));
                let sounds = |channel| notes.iter().any(|n| n.channel == channel);
                let [chords, bass, drone, kit] = match facts.accompaniment {
                    Accompaniment::None => [false; 4],
                    Accompaniment::Drone => [false, false, true, false],
                    Accompaniment::Chords => [true, false, false, false],
                    Accompaniment::BassAndChords => [true, true, false, false],
                    Accompaniment::Drums => [false, false, false, true],
                    Accompaniment::Band => [true, true, false, true],
                };
                assert_eq!(
                    [sounds(CHORDS), sounds(BASS), sounds(DRONE), sounds(KIT)],
                    [chords, bass, drone, kit]
                );
                assert!(notes.iter().all(|n| channels.iter().any(|(c, ..)| *c == n.channel)));
                assert_eq!(facts.chord_instrument.is_some(), chords);
                assert!(notes.iter().all(|n| (0.0..CLIP_S).contains(&n.on_s) && n.off_s > n.on_s));
            }
        }
    }

    #[test]
    fn the_tempo_is_the_rate_of_the_drums() {
        for meter in ["C|", "6/8", "3/4"] {
            for Arrangement { facts, notes, .. } in arrangements(meter) {
                // beats carry a bass drum or a snare; the first bar has one at each end of a pair of beats
                let bass_drum: Vec<f64> = notes
                    .iter()
                    .filter(|n| n.channel == KIT && n.key == 36 && n.velocity > 100)
                    .map(|n| n.on_s)
                    .collect();
                if bass_drum.len() > 1 {
                    let beats = if meter == "3/4" { 3.0 } else { 2.0 };
                    let bpm = 60.0 * beats / (bass_drum[1] - bass_drum[0]);
                    assert!(
                        (bpm - f64::from(facts.tempo_bpm)).abs() < 1e-6,
                        "{meter}: {bpm} {}",
                        facts.tempo_bpm
                    );
                }
            }
        }
    }

    #[test]
    fn chords_have_the_melody_in_them() {
        let tune = tune("C|");
        // the bar "GABc dedB" in G: its first half is on the tonic
        assert_eq!(harmonise(&tune.key, &tune.bars[0], 0, tune.meter.beat())[0], 7);
        // "c2A2" asks for the subdominant or its relative
        assert!([0, 9].contains(&harmonise(&tune.key, &tune.bars[1], 0, tune.meter.beat())[0]));
    }

    #[test]
    fn kinds_of_tune_are_found_in_rhythm_or_title() {
        assert_eq!(tune_type(&tune("C|")), Some("reel"));
        let mut tune = tune("6/8");
        tune.title = "The Jiggery Man".into();
        assert_eq!(tune_type(&tune), None);
        tune.rhythm = "slip jig".into();
        assert_eq!(tune_type(&tune), Some("slip jig"));
    }
}
