//! Keys, modes and metres.

use super::WHOLE;

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
    /// Parses the text of an `M:` field; `None` if it names no metre.
    pub fn parse(value: &str) -> Option<Meter> {
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

    /// The key on a letter (0 is C), sharpened or flattened.
    pub(super) fn new(letter: usize, accidental: i32, mode: Mode) -> Key {
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
pub(super) const LETTERS: [u8; 7] = [0, 2, 4, 5, 7, 9, 11];

/// Place of a note name in [`LETTERS`].
pub(super) fn letter_index(c: char) -> Option<usize> {
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
