//! The body of a tune, read token by token into bars as they are written.

use super::key::{Key, LETTERS, letter_index};
use super::repeats::Written;
use super::{Note, WHOLE};

/// Longest note, ticks: keeps hostile lengths from overflowing.
const MAX_LENGTH: u32 = 4 * WHOLE;

/// Reader of a tune's body.
pub(super) struct Body {
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
    /// A reader at the start of the body.
    pub fn new(key: Key, unit: u32) -> Self {
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

    /// A field between or inside lines, such as a change of key.
    pub fn field(&mut self, field: char, value: &str) {
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

    /// A line of music.
    pub fn line(&mut self, line: &str) {
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

    /// All bars, the last one closed.
    pub fn finish(mut self) -> Vec<Written> {
        self.close_bar(false, true);
        self.written
    }
}

/// Parses the text of an `L:` field, such as "1/8", as ticks.
pub(super) fn parse_length(value: &str) -> Option<u32> {
    let (over, under) = value.trim().split_once('/')?;
    let (over, under): (u32, u32) = (over.trim().parse().ok()?, under.trim().parse().ok()?);
    (over == 1 && under.is_power_of_two() && under <= 64).then(|| WHOLE / under)
}
