use proptest::prelude::*;

use super::key::LETTERS;
use super::{Key, Tune, WHOLE, parse};

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
