//! ABC notation (standard 2.1, the part that tune collections use) to notes.
//!
//! Read: notes, accidentals, lengths, chords, broken rhythm, tuplets, ties, rests, bar lines, repeats with endings,
//! key signatures with modes, changes of key, metre and unit length, the first voice. Passed over: ornaments, grace
//! notes, fingerings, annotations, chord symbols, lyrics, further voices. The parser never fails on odd text: what it
//! does not know it passes over; [`Tune::is_regular`] tells whether what came out is music to rely on.

/// Ticks per whole note: divisible by 128, 9, 5 and 7, so note lengths and tuplets stay exact.
pub const WHOLE: u32 = 40320;

/// Longest note, ticks: keeps hostile lengths from overflowing.
const MAX_LENGTH: u32 = 4 * WHOLE;

/// Longest tune kept, in bars after repeats; hostile repeats cannot grow it further.
const MAX_BARS: usize = 1000;

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

/// Metre.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Meter {
    /// Beats or pulses per bar.
    pub over: u32,
    /// Note value of one: 4 is a quarter.
    pub under: u32,
    /// Written `C|`: two halves, not four quarters.
    pub cut: bool,
}

impl Meter {
    /// Length of a bar, ticks.
    pub fn bar(&self) -> u32 {
        self.over * WHOLE / self.under
    }

    /// Whether pulses group in threes: 6/8, 9/8, 12/8, 6/4 and so on.
    pub fn is_compound(&self) -> bool {
        self.over.is_multiple_of(3) && self.over > 3
    }

    /// Length of a felt beat, ticks: three pulses if compound, a half note in `C`, `C|` and 4/4, else one pulse.
    pub fn beat(&self) -> u32 {
        match (self.over, self.under) {
            (3, 8) => 3 * WHOLE / 8,
            (4, 4) => WHOLE / 2,
            (_, under) if self.is_compound() => 3 * WHOLE / under,
            (_, under) => WHOLE / under,
        }
    }

    /// As a fraction, "6/8".
    pub fn name(&self) -> String {
        format!("{}/{}", self.over, self.under)
    }
}

/// Mode of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Ionian.
    Major,
    /// Aeolian.
    Minor,
    /// Natural minor with a raised sixth.
    Dorian,
    /// Major with a lowered seventh.
    Mixolydian,
    /// Major with a raised fourth.
    Lydian,
    /// Natural minor with a lowered second.
    Phrygian,
    /// Phrygian with a lowered fifth.
    Locrian,
}

impl Mode {
    /// English name, lower case.
    pub fn name(self) -> &'static str {
        match self {
            Mode::Major => "major",
            Mode::Minor => "minor",
            Mode::Dorian => "dorian",
            Mode::Mixolydian => "mixolydian",
            Mode::Lydian => "lydian",
            Mode::Phrygian => "phrygian",
            Mode::Locrian => "locrian",
        }
    }

    /// Sharps of the signature relative to the major key on the same tonic.
    fn sharps(self) -> i32 {
        match self {
            Mode::Lydian => 1,
            Mode::Major => 0,
            Mode::Mixolydian => -1,
            Mode::Dorian => -2,
            Mode::Minor => -3,
            Mode::Phrygian => -4,
            Mode::Locrian => -5,
        }
    }

    /// The seven pitch classes relative to the tonic.
    pub fn scale(self) -> [u8; 7] {
        match self {
            Mode::Major => [0, 2, 4, 5, 7, 9, 11],
            Mode::Minor => [0, 2, 3, 5, 7, 8, 10],
            Mode::Dorian => [0, 2, 3, 5, 7, 9, 10],
            Mode::Mixolydian => [0, 2, 4, 5, 7, 9, 10],
            Mode::Lydian => [0, 2, 4, 6, 7, 9, 11],
            Mode::Phrygian => [0, 1, 3, 5, 7, 8, 10],
            Mode::Locrian => [0, 1, 3, 5, 6, 8, 10],
        }
    }
}

/// Key: tonic, mode and the accidentals that follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key {
    /// Pitch class of the tonic; 0 is C.
    pub tonic: u8,
    /// Mode.
    pub mode: Mode,
    /// Semitones added to each letter from C to B.
    pub signature: [i8; 7],
}

impl Key {
    /// Parses the text of a `K:` field; C major if it names no key.
    pub fn parse(text: &str) -> Key {
        let text = text.split('%').next().unwrap_or("").trim();
        if text.starts_with("HP") || text.starts_with("Hp") {
            return Key::new(5, 0, Mode::Mixolydian); // Highland pipes: A with two sharps
        }
        let mut chars = text.chars();
        let Some(letter) = chars.next().and_then(letter_index) else {
            return Key::new(0, 0, Mode::Major);
        };
        let mut rest = chars.as_str();
        let mut accidental = 0;
        if let Some(r) = rest.strip_prefix('#') {
            (accidental, rest) = (1, r);
        } else if let Some(r) = rest.strip_prefix('b') {
            (accidental, rest) = (-1, r);
        }
        let mut words = rest.split_whitespace().peekable();
        // "Ador", "A Dorian", "Am", "A"; later words are accidentals or clefs
        let mut mode = Mode::Major;
        if let Some(&word) = words.peek() {
            let end = word.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(word.len());
            if let Some(m) = mode_of(&word[..end]) {
                mode = m;
            }
        }
        let mut key = Key::new(letter, accidental, mode);
        // explicit accidentals: "Dmix=c", "D ^f"
        let bytes: Vec<char> = rest.chars().collect();
        for pair in bytes.windows(2) {
            let shift = match pair[0] {
                '^' => 1,
                '_' => -1,
                '=' => 0,
                _ => continue,
            };
            if let Some(i) = letter_index(pair[1]) {
                key.signature[i] = shift;
            }
        }
        key
    }

    fn new(letter: usize, accidental: i32, mode: Mode) -> Key {
        /// Sharps of the major key on each letter from C.
        const SHARPS: [i32; 7] = [0, 2, 4, -1, 1, 3, 5];
        /// Letters in the order in which sharps appear: F C G D A E B.
        const ORDER: [usize; 7] = [3, 0, 4, 1, 5, 2, 6];
        let sharps = (SHARPS[letter] + 7 * accidental + mode.sharps()).clamp(-7, 7);
        let mut signature = [0; 7];
        for i in 0..sharps.unsigned_abs() as usize {
            if sharps > 0 {
                signature[ORDER[i]] = 1;
            } else {
                signature[ORDER[6 - i]] = -1;
            }
        }
        let tonic = (i32::from(LETTERS[letter]) + accidental).rem_euclid(12) as u8;
        Key { tonic, mode, signature }
    }

    /// Name such as "D major" or "Bb dorian", for any transposition of it.
    pub fn name(tonic: u8, mode: Mode) -> String {
        const NAMES: [&str; 12] = ["C", "C#", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B"];
        format!("{} {}", NAMES[usize::from(tonic % 12)], mode.name())
    }
}

/// Semitones of C D E F G A B above C.
const LETTERS: [u8; 7] = [0, 2, 4, 5, 7, 9, 11];

fn letter_index(c: char) -> Option<usize> {
    "CDEFGAB".find(c.to_ascii_uppercase())
}

fn mode_of(word: &str) -> Option<Mode> {
    if word == "m" {
        return Some(Mode::Minor);
    }
    if word == "M" {
        return Some(Mode::Major);
    }
    let start: String = word.chars().take(3).collect::<String>().to_ascii_lowercase();
    Some(match start.as_str() {
        "maj" | "ion" => Mode::Major,
        "min" | "aeo" => Mode::Minor,
        "dor" => Mode::Dorian,
        "mix" => Mode::Mixolydian,
        "lyd" => Mode::Lydian,
        "phr" => Mode::Phrygian,
        "loc" => Mode::Locrian,
        _ => return None,
    })
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
                (None, 'M') => tune.meter = parse_meter(value).unwrap_or(tune.meter),
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

fn parse_meter(value: &str) -> Option<Meter> {
    let word = value.split(|c: char| c.is_whitespace() || c == '%').next()?;
    match word {
        "C" => return Some(Meter { over: 4, under: 4, cut: false }),
        "C|" => return Some(Meter { over: 4, under: 4, cut: true }),
        _ => {}
    }
    let (over, under) = word.split_once('/')?;
    let (over, under): (u32, u32) = (over.parse().ok()?, under.parse().ok()?);
    ((1..=24).contains(&over) && [1, 2, 4, 8, 16, 32].contains(&under)).then_some(Meter {
        over,
        under,
        cut: false,
    })
}

fn parse_length(value: &str) -> Option<u32> {
    let (over, under) = value.trim().split_once('/')?;
    let (over, under): (u32, u32) = (over.trim().parse().ok()?, under.trim().parse().ok()?);
    (over == 1 && under.is_power_of_two() && under <= 64).then(|| WHOLE / under)
}

/// A bar as written, with its repeat marks.
#[derive(Debug, Clone, Default)]
struct Written {
    bar: Bar,
    /// `|:` before it.
    starts_repeat: bool,
    /// `:|` after it.
    ends_repeat: bool,
    /// First bar of this ending (`[1`, `|2`).
    ending: Option<u8>,
    /// A double bar after it, which closes an ending.
    closes: bool,
}

/// Reader of a tune's body.
struct Body {
    key: Key,
    /// Unit note length, ticks.
    unit: u32,
    /// Whether lines belong to the first voice.
    in_first_voice: bool,
    first_voice: Option<String>,
    written: Vec<Written>,
    now: Written,
    /// Accidentals in force until the bar line: (letter, octave) to semitones.
    accidentals: Vec<((usize, i32), i8)>,
    /// Length factor of the next note after `>` or `<`.
    broken: Option<(u32, u32)>,
    /// Tuplet in force: factor over and under, notes left.
    tuplet: Option<(u32, u32, u32)>,
    /// Index range in `now.bar.notes` of the last note or chord, with its length.
    last: Option<(usize, u32)>,
    /// Pitches tied over to the next note.
    tied: Vec<u8>,
}

impl Body {
    fn new(key: Key, unit: u32) -> Self {
        Body {
            key,
            unit,
            in_first_voice: true,
            first_voice: None,
            written: Vec::new(),
            now: Written::default(),
            accidentals: Vec::new(),
            broken: None,
            tuplet: None,
            last: None,
            tied: Vec::new(),
        }
    }

    fn field(&mut self, field: char, value: &str) {
        match field {
            // "K: clef=bass" and the like change no key
            'K' if self.in_first_voice && value.starts_with(|c| "ABCDEFGH".contains(c)) => {
                self.key = Key::parse(value);
            }
            'L' if self.in_first_voice => self.unit = parse_length(value).unwrap_or(self.unit),
            'V' => {
                let name = value.split_whitespace().next().unwrap_or("").to_string();
                let first = self.first_voice.get_or_insert_with(|| name.clone());
                self.in_first_voice = *first == name;
            }
            _ => {}
        }
    }

    fn line(&mut self, line: &str) {
        let chars: Vec<char> = line.chars().collect();
        let mut i = 0;
        while i < chars.len() {
            i = self.token(&chars, i);
        }
    }

    /// Reads what starts at `chars[i]`; returns where it ends, always beyond `i`.
    fn token(&mut self, chars: &[char], i: usize) -> usize {
        let c = chars[i];
        let next = chars.get(i + 1).copied();
        let until =
            |close: char| chars[i + 1..].iter().position(|&x| x == close).map_or(chars.len(), |n| i + n + 2);
        match c {
            '%' => chars.len(),
            '"' => until('"'),
            '{' => until('}'),
            // decorations !trill!, +trill+; a lone mark is passed over
            '!' | '+' => chars[i + 1..]
                .iter()
                .take(24)
                .position(|&x| x == c)
                .filter(|&n| chars[i + 1..i + 1 + n].iter().all(|x| !x.is_whitespace() && *x != '|'))
                .map_or(i + 1, |n| i + n + 2),
            '[' if next.is_some_and(|n| n.is_ascii_alphabetic()) && chars.get(i + 2) == Some(&':') => {
                let end = until(']');
                let value: String = chars[i + 3..end.saturating_sub(1).max(i + 3)].iter().collect();
                self.field(chars[i + 1], value.trim());
                end
            }
            _ if !self.in_first_voice => i + 1,
            '[' if next.is_some_and(|n| n.is_ascii_digit()) => {
                self.now.ending = next.and_then(|n| n.to_digit(10)).map(|d| d as u8);
                i + 2
            }
            '[' if next == Some('|') => self.bar_line(chars, i + 1),
            '[' => self.chord(chars, i),
            '|' | ':' => self.bar_line(chars, i),
            '(' if next.is_some_and(|n| n.is_ascii_digit()) => self.tuplet(chars, i + 1),
            '>' | '<' => self.broken_rhythm(chars, i),
            '-' => {
                if let Some((first, _)) = self.last {
                    self.tied = self.now.bar.notes[first..].iter().map(|n| n.pitch).collect();
                }
                i + 1
            }
            'z' | 'x' => {
                let (length, end) = self.length(chars, i + 1);
                self.last = Some((self.now.bar.notes.len(), length));
                self.advance(length);
                end
            }
            '^' | '_' | '=' | 'A'..='G' | 'a'..='g' => match self.pitch(chars, i) {
                Some((pitch, end)) => {
                    let (length, end) = self.length(chars, end);
                    self.sound(&[pitch], length);
                    end
                }
                None => i + 1,
            },
            _ => i + 1,
        }
    }

    /// Accidental, letter and octave marks from `i`.
    fn pitch(&mut self, chars: &[char], mut i: usize) -> Option<(u8, usize)> {
        let mut accidental: Option<i8> = None;
        while let Some(&c) = chars.get(i) {
            let step = match c {
                '^' => 1,
                '_' => -1,
                '=' => 0,
                _ => break,
            };
            accidental = Some((accidental.unwrap_or(0) + step).clamp(-2, 2));
            i += 1;
        }
        let &c = chars.get(i)?;
        let letter = letter_index(c)?;
        let mut octave = i32::from(c.is_ascii_lowercase());
        i += 1;
        while let Some(&c) = chars.get(i) {
            match c {
                '\'' => octave += 1,
                ',' => octave -= 1,
                _ => break,
            }
            i += 1;
        }
        let place = (letter, octave);
        if let Some(a) = accidental {
            self.accidentals.retain(|(p, _)| *p != place);
            self.accidentals.push((place, a));
        }
        let shift = self
            .accidentals
            .iter()
            .find(|(p, _)| *p == place)
            .map_or(self.key.signature[letter], |(_, a)| *a);
        let pitch = 60 + 12 * octave.clamp(-6, 6) + i32::from(LETTERS[letter]) + i32::from(shift);
        u8::try_from(pitch).ok().filter(|&p| p < 128).map(|p| (p, i))
    }

    /// Length marks from `i` ("3", "/", "//", "3/2"), as ticks.
    fn length(&self, chars: &[char], mut i: usize) -> (u32, usize) {
        let number = |mut i: usize| {
            let mut value: Option<u32> = None;
            while let Some(d) = chars.get(i).and_then(|c| c.to_digit(10)) {
                value = Some((value.unwrap_or(0) * 10 + d).min(256));
                i += 1;
            }
            (value, i)
        };
        let (over, end) = number(i);
        i = end;
        let mut under = 1u32;
        while chars.get(i) == Some(&'/') {
            let (n, end) = number(i + 1);
            under = (under * n.unwrap_or(2).max(1)).min(256);
            i = end;
        }
        ((self.unit * over.unwrap_or(1) / under).min(MAX_LENGTH), i)
    }

    /// Plays `pitches` together for `length` ticks, before tuplets and broken rhythm.
    fn sound(&mut self, pitches: &[u8], length: u32) {
        let first = self.now.bar.notes.len();
        let onset = self.now.bar.length;
        let factor = self.factor();
        let length = length * factor.0 / factor.1;
        let tied = std::mem::take(&mut self.tied);
        for &pitch in pitches {
            if tied.contains(&pitch) && self.lengthen_tied(pitch, length) {
                continue;
            }
            self.now.bar.notes.push(Note { onset, length, pitch });
        }
        self.now.bar.length = self.now.bar.length.saturating_add(length);
        self.last = Some((first, length));
    }

    /// Adds `length` to the latest note of this pitch, in this bar or the one before; false if there is none.
    fn lengthen_tied(&mut self, pitch: u8, length: u32) -> bool {
        let before = self.written.last_mut().map(|w| &mut w.bar.notes);
        let note = self.now.bar.notes.iter_mut().rev().find(|n| n.pitch == pitch);
        match note.or_else(|| before.and_then(|notes| notes.iter_mut().rev().find(|n| n.pitch == pitch))) {
            Some(note) => {
                note.length = (note.length + length).min(MAX_LENGTH);
                true
            }
            None => false,
        }
    }

    /// A rest of `length` ticks, before tuplets and broken rhythm.
    fn advance(&mut self, length: u32) {
        let factor = self.factor();
        let length = length * factor.0 / factor.1;
        self.now.bar.length = self.now.bar.length.saturating_add(length);
        self.last = Some((self.now.bar.notes.len(), length));
    }

    /// The factor that tuplet and broken rhythm put on the next note; used up by it.
    fn factor(&mut self) -> (u32, u32) {
        let (mut over, mut under) = self.broken.take().unwrap_or((1, 1));
        if let Some((p, q, left)) = &mut self.tuplet {
            (over, under) = (over * *q, under * *p);
            *left -= 1;
            if *left == 0 {
                self.tuplet = None;
            }
        }
        (over, under)
    }

    /// `>`, `>>`, `<`, `<<`: the note before and the note after share their time unequally.
    fn broken_rhythm(&mut self, chars: &[char], i: usize) -> usize {
        let n = chars[i..].iter().take_while(|&&c| c == chars[i]).count();
        let small = 1u32 << n.min(3); // the short one is 1/small of its length, the long one gains the rest
        let (before, after) = if chars[i] == '>' {
            ((2 * small - 1, small), (1, small))
        } else {
            ((1, small), (2 * small - 1, small))
        };
        if let Some((first, length)) = self.last.take() {
            let new = length * before.0 / before.1;
            for note in &mut self.now.bar.notes[first..] {
                note.length = new;
            }
            self.now.bar.length = self.now.bar.length.saturating_sub(length).saturating_add(new);
            self.broken = Some(after);
        }
        i + n
    }

    /// `(p`, `(p:q`, `(p:q:r`: r notes, each q/p of its length.
    fn tuplet(&mut self, chars: &[char], mut i: usize) -> usize {
        let mut numbers = [None; 3];
        for slot in &mut numbers {
            *slot = chars.get(i).and_then(|c| c.to_digit(10));
            i += usize::from(slot.is_some());
            if chars.get(i) != Some(&':')
                || !chars.get(i + 1).is_some_and(|c| *c == ':' || c.is_ascii_digit())
            {
                break;
            }
            i += 1;
        }
        let p = numbers[0].unwrap_or(3);
        let q = numbers[1].unwrap_or(match p {
            2 | 4 | 8 => 3,
            3 | 6 => 2,
            _ => 2,
        });
        let r = numbers[2].unwrap_or(p);
        if p > 0 && q > 0 && r > 0 {
            self.tuplet = Some((p, q, r));
        }
        i
    }

    /// `[CEG]2`.
    fn chord(&mut self, chars: &[char], i: usize) -> usize {
        let Some(n) = chars[i + 1..].iter().position(|&c| c == ']') else {
            return i + 1;
        };
        let end = i + 1 + n;
        let (mut pitches, mut length, mut at) = (Vec::new(), None, i + 1);
        while at < end {
            match self.pitch(&chars[..end], at) {
                Some((pitch, after)) => {
                    let (note_length, after) = self.length(&chars[..end], after);
                    length.get_or_insert(note_length); // the first note's length counts
                    if !pitches.contains(&pitch) {
                        pitches.push(pitch);
                    }
                    at = after.max(at + 1);
                }
                None => at += 1,
            }
        }
        let (outer, after) = self.length(chars, end + 1);
        if let Some(length) = length {
            let length = u64::from(length) * u64::from(outer) / u64::from(self.unit.max(1));
            self.sound(&pitches, length.min(u64::from(MAX_LENGTH)) as u32);
        }
        after
    }

    /// Any bar line from `i`: `|`, `||`, `|]`, `[|`, `|:`, `:|`, `::`, with an ending's number after it.
    fn bar_line(&mut self, chars: &[char], i: usize) -> usize {
        let mut end = i;
        while chars.get(end).is_some_and(|c| "|:]".contains(*c)) {
            end += 1;
        }
        let mark: String = chars[i..end].iter().collect();
        let (ends, starts) = (mark.starts_with(':'), mark.ends_with(':'));
        let closes = ends || mark.matches('|').count() > 1 || mark.ends_with(']');
        self.close_bar(ends, closes);
        self.now.starts_repeat |= starts && (mark != ":" || ends);
        if let Some(d) = chars.get(end).and_then(|c| c.to_digit(10)) {
            self.now.ending = Some(d as u8);
            end += 1;
        }
        end
    }

    fn close_bar(&mut self, ends_repeat: bool, closes: bool) {
        self.accidentals.clear();
        self.last = None;
        self.broken = None;
        self.tuplet = None;
        if self.now.bar.length == 0 {
            // an empty bar: two bar lines in a row; its marks belong to its neighbours
            if let Some(before) = self.written.last_mut() {
                before.ends_repeat |= ends_repeat;
                before.closes |= closes;
            }
            return;
        }
        let mut done = std::mem::take(&mut self.now);
        (done.ends_repeat, done.closes) = (ends_repeat, closes);
        self.written.push(done);
    }

    fn finish(mut self) -> Vec<Written> {
        self.close_bar(false, true);
        self.written
    }
}

/// Bars in playing order: each repeated part twice, with its first ending the first time and its second the second.
fn expand(written: &[Written]) -> Vec<Bar> {
    let mut bars = Vec::new();
    let (mut start, mut i, mut pass) = (0, 0, 1u8);
    let mut ending: Option<u8> = None;
    let mut repeated = vec![false; written.len()];
    while i < written.len() && bars.len() < MAX_BARS {
        let w = &written[i];
        if w.starts_repeat && start != i {
            (start, pass, ending) = (i, 1, None);
        }
        if w.ending.is_some() {
            ending = w.ending;
        }
        if ending.is_none_or(|e| e == pass || e > 2) {
            bars.push(w.bar.clone());
        }
        let wrong_ending = ending.is_some_and(|e| e != pass && e <= 2);
        if w.ends_repeat && !repeated[i] && pass == 1 && !wrong_ending {
            repeated[i] = true;
            (i, pass, ending) = (start, 2, None);
            continue;
        }
        let repeat_is_done = w.ends_repeat && !(wrong_ending && pass == 2);
        if repeat_is_done || w.closes && ending == Some(2) {
            (start, pass, ending) = (i + 1, 1, None);
        }
        i += 1;
    }
    bars
}

/// Joins neighbouring bars that fill one bar together: the end of a part and the upbeat of the next.
fn join_halves(bars: Vec<Bar>, bar: u32) -> Vec<Bar> {
    let mut joined: Vec<Bar> = Vec::new();
    for next in bars {
        match joined.last_mut() {
            Some(last) if last.length < bar && last.length + next.length == bar => {
                let shift = last.length;
                last.notes.extend(next.notes.iter().map(|n| Note { onset: n.onset + shift, ..*n }));
                last.length = bar;
            }
            _ => joined.push(next),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tune(body: &str) -> Tune {
        parse(&format!("X:1\nT:Test\nM:4/4\nL:1/8\nK:G\n{body}\n")).remove(0)
    }

    fn pitches(tune: &Tune) -> Vec<u8> {
        tune.bars.iter().flat_map(|b| b.notes.iter().map(|n| n.pitch)).collect()
    }

    fn lengths(tune: &Tune) -> Vec<u32> {
        tune.bars.iter().flat_map(|b| b.notes.iter().map(|n| n.length * 8 * 12 / WHOLE)).collect()
    }

    #[test]
    fn the_scale_has_the_signature_of_its_key() {
        assert_eq!(pitches(&tune("GABc defg")), [67, 69, 71, 72, 74, 76, 78, 79]);
        assert_eq!(pitches(&tune("C, C c c'")), [48, 60, 72, 84]);
    }

    #[test]
    fn accidentals_last_until_the_bar_line_and_for_their_octave() {
        assert_eq!(pitches(&tune("=F F f ^G|F _B __B ^^c|")), [65, 65, 78, 68, 66, 70, 69, 74]);
    }

    #[test]
    fn lengths_tuplets_and_broken_rhythm_are_exact() {
        // in twelfths of an eighth
        assert_eq!(lengths(&tune("A A2 A/ A// A3/2 A/4")), [12, 24, 6, 3, 18, 3]);
        assert_eq!(lengths(&tune("(3ABc A>B A<B A>>B")), [8, 8, 8, 18, 6, 6, 18, 21, 3]);
        assert_eq!(lengths(&tune("(3:2:2ABc (5:4:5ABcde z2 [GB]2")), [8, 8, 12, 9, 9, 9, 9, 9, 24, 24]);
    }

    #[test]
    fn ties_join_notes_across_the_bar_line() {
        let tune = tune("A6 B2-|B4 A4|");
        assert_eq!(pitches(&tune), [69, 71, 69]);
        assert_eq!(tune.bars[0].notes[1].length, 6 * WHOLE / 8);
        assert_eq!((tune.bars[1].notes[0].onset, tune.bars[1].length), (WHOLE / 2, WHOLE));
    }

    #[test]
    fn repeats_and_endings_are_written_out() {
        assert_eq!(pitches(&tune("A8:|B8|")), [69, 69, 71]);
        assert_eq!(pitches(&tune("A8|:B8:|c8|")), [69, 71, 71, 72]);
        assert_eq!(pitches(&tune("|:A8|1 B8:|2 c8||d8|")), [69, 71, 69, 72, 74]);
        assert_eq!(pitches(&tune("|:A8|[1 B8:|[2 c8|]|:d8:|")), [69, 71, 69, 72, 74, 74]);
        assert_eq!(pitches(&tune("A8::B8:|")), [69, 69, 71, 71]);
        assert_eq!(pitches(&tune("A8\n|1 B8:|2 c8\n|:d8:|")), [69, 71, 69, 72, 74, 74]);
    }

    #[test]
    fn an_upbeat_joins_the_short_bar_before_it() {
        let tune = tune("d2|G8|G6::d2|B8|B6:|");
        let whole: Vec<bool> = tune.bars.iter().map(|b| b.length == WHOLE).collect();
        assert_eq!(whole, [false, true, true, true, true, true, true, true, false]);
    }

    #[test]
    fn ornaments_annotations_and_further_voices_are_passed_over() {
        let text = "\"Am\"~A {gf}!trill!B .c T`d|[V:2] GGGG|[V:1]e% comment g\nw: words\nV:2\nGG|\nV:1\nf|";
        assert_eq!(pitches(&tune(&format!("[V:1]{text}"))), [69, 71, 72, 74, 76, 78]);
    }

    #[test]
    fn keys_and_modes_are_understood() {
        let key = |text| {
            let k = Key::parse(text);
            (Key::name(k.tonic, k.mode), k.signature.iter().map(|&s| i32::from(s)).sum::<i32>())
        };
        for (text, name, sharps) in [
            ("D", "D major", 2),
            ("E Minor", "E minor", 1),
            ("Am", "A minor", 0),
            ("A Mixolydian", "A mixolydian", 2),
            ("Ador", "A dorian", 1),
            ("Bb", "Bb major", -2),
            ("EDorian", "E dorian", 2),
            ("GM", "G major", 1),
            ("F# min", "F# minor", 3),
            ("Hp", "A mixolydian", 2),
            ("Glyd % two sharps", "G lydian", 2),
            ("Dmix=c", "D mixolydian", 1),
            ("", "C major", 0),
        ] {
            assert_eq!(key(text), (name.to_string(), sharps), "K:{text}");
        }
    }

    proptest! {
        #[test]
        fn hostile_text_never_panics(text in ".{0,400}") {
            parse(&text);
            parse(&format!("X:1\nK:D\n{text}"));
        }

        #[test]
        fn hostile_notation_never_panics(
            text in "[A-Ga-gzx|:\\[\\]()<>/0-9^_=,'\"!{}%~ \n-]{0,300}|(\\[V:1\\]|\\[K:Am\\]|\\|1|:\\|2|\\(9:1:9|[a-g]99){0,60}",
        ) {
            for tune in parse(&format!("X:1\nM:6/8\nL:1/16\nK:Bbm\n{text}")) {
                for bar in &tune.bars {
                    for pair in bar.notes.windows(2) {
                        prop_assert!(pair[0].onset <= pair[1].onset);
                    }
                    prop_assert!(bar.notes.iter().all(|n| n.onset <= bar.length && n.pitch < 128));
                }
            }
        }

        #[test]
        fn plain_notes_come_back(letters in prop::collection::vec(0usize..7, 1..40), sharps in 0u8..2) {
            let names = ["C", "D", "E", "F", "G", "A", "B"];
            let body: String = letters.iter().map(|&l| format!("{}{} ", ["", "^"][usize::from(sharps)], names[l])).collect();
            let got = pitches(&parse(&format!("X:1\nL:1/8\nK:C\n{body}")).remove(0));
            let want: Vec<u8> = letters.iter().map(|&l| 60 + LETTERS[l] + sharps).collect();
            prop_assert_eq!(got, want);
        }
    }
}
