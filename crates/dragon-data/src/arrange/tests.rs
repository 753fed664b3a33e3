use super::*;
use crate::abc::{Mode, parse};

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
    (0..300).filter_map(|i| arrange(&tune, 5.12, &mut Choices::new(5, &format!("{i}")))).collect()
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
            assert!(notes.iter().all(|n| (0.0..5.12).contains(&n.on_s) && n.off_s > n.on_s));
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
