//! An arrangement in words: every statement is true of what was rendered, in varied wording.
//!
//! A caption is one of [`N_FORMS`] sentence forms whose slots (player, tempo, kind of tune, key, metre, register) are
//! filled with seeded synonyms. At most [`MAX_WORDS`] words.

use crate::arrange::{Accompaniment, Facts, Register, Tempo};
use crate::rng::Choices;

/// Longest caption, in words.
pub const MAX_WORDS: usize = 23;

/// Number of sentence forms.
pub const N_FORMS: usize = 26;

/// A caption and the number of its form.
pub fn caption(facts: &Facts, choices: &mut Choices) -> (String, usize) {
    loop {
        let form = choices.below(N_FORMS);
        let text = capitalise(&fill(facts, form, choices), choices);
        if text.split_whitespace().count() <= MAX_WORDS {
            return (text, form);
        }
    }
}

/// The words of one form.
fn fill(facts: &Facts, form: usize, choices: &mut Choices) -> String {
    let instrument = facts.instrument;
    let tempo = tempo(facts, choices);
    let kind = kind(facts, choices);
    let player = player(facts, choices);
    let key = &facts.key;
    let bpm = facts.tempo_bpm;
    let meter = meter(facts, choices);
    let register = register(facts, choices);
    match form {
        0 => format!("{} {kind} on {player}", a(tempo)),
        1 => format!("{player} playing {} {kind}", a(tempo)),
        2 => format!("{player}, {tempo}, in {key}"),
        3 => format!("{} {kind} in {key}, {player}", a(tempo)),
        4 => format!("{player}: {tempo} {kind}"),
        5 => format!("{tempo} music for {player}"),
        6 => format!("{kind} for {player}, {bpm} bpm"),
        7 => format!("{player}, {meter}, {tempo}"),
        8 => format!("{player} in {key} at {bpm} beats per minute"),
        9 => format!("{} folk tune played by {player}", a(tempo)),
        10 => player,
        11 => format!("{} {kind} {meter} for {player}", a(tempo)),
        12 => format!("{register} {player}, {tempo}"),
        13 => format!("{} melody, {register}, on {player}", a(tempo)),
        14 => format!("{kind} arranged for {player}"),
        15 => format!("{key}, {tempo}, {player}"),
        16 => format!("the sound of {player}, playing {} {kind}", a(tempo)),
        17 => format!("{tempo} {kind}, {bpm} bpm, {key}, {player}"),
        18 => format!("instrumental {kind} with {} lead: {player}", a(instrument)),
        19 => format!("{player} {meter}"),
        20 => format!("{} {kind} {meter} in {key} for {player}", a(tempo)),
        21 => format!("listen to {player} play {} {kind}", a(tempo)),
        22 => format!("{player}, {} key, {tempo} tempo", facts.mode),
        23 => format!("{} {} {kind} for {player}", a(tempo), facts.mode),
        24 => format!("{player} with {} tempo", a(tempo)),
        _ => format!("{register} {kind} on {player}, {tempo}"),
    }
}

/// Melody instrument with what sounds beside it.
fn player(facts: &Facts, choices: &mut Choices) -> String {
    let instrument = facts.instrument;
    let chords = facts.chord_instrument.unwrap_or("");
    let with = match facts.accompaniment {
        Accompaniment::None => {
            return format!(
                "{} {instrument}",
                choices.pick(&["solo", "unaccompanied", "lone", "solo", "solo"])
            );
        }
        Accompaniment::Drone => choices
            .pick(&["over a drone", "with a drone", "above a low drone", "over a steady drone"])
            .to_string(),
        Accompaniment::Chords => match choices.below(4) {
            0 => format!("with {} chords", one(chords)),
            1 => format!("accompanied by {chords}"),
            2 => format!("over {} chords", one(chords)),
            _ => format!("and {chords}"),
        },
        Accompaniment::BassAndChords => match choices.below(4) {
            0 => format!("with bass and {chords}"),
            1 => format!("over bass and {} chords", one(chords)),
            2 => format!("with {chords} and bass"),
            _ => format!("accompanied by {chords} and bass"),
        },
        Accompaniment::Drums => {
            choices.pick(&["with drums", "over a drum beat", "and drums", "with a drum kit"]).to_string()
        }
        Accompaniment::Band => match choices.below(4) {
            0 => format!("with bass, {chords} and drums"),
            1 => format!("with a band of {chords}, bass and drums"),
            2 => format!("over drums, bass and {chords}"),
            _ => format!("with drums, {chords} and bass"),
        },
    };
    format!("{instrument} {with}")
}

fn tempo(facts: &Facts, choices: &mut Choices) -> &'static str {
    match facts.tempo {
        Tempo::Slow => choices.pick::<&str>(&["slow", "slow", "unhurried", "slow-paced"]),
        Tempo::Medium => choices.pick::<&str>(&["medium-tempo", "moderate", "mid-tempo"]),
        Tempo::Fast => choices.pick::<&str>(&["fast", "fast", "quick", "lively"]),
    }
}

/// The kind of tune, if the source names it and the dice agree, else a general word.
fn kind(facts: &Facts, choices: &mut Choices) -> &'static str {
    let general = *choices.pick(&["tune", "melody", "folk tune", "piece"]);
    match facts.tune_type {
        Some(kind) if choices.chance(0.75) => kind,
        _ => general,
    }
}

fn meter(facts: &Facts, choices: &mut Choices) -> String {
    match (facts.triple, facts.compound) {
        (true, _) => choices.pick(&["in triple time", "in three"]).to_string(),
        (_, true) => match choices.below(2) {
            0 => format!("in {}", facts.meter),
            _ => "in compound time".to_string(),
        },
        _ => match choices.below(2) {
            0 => format!("in {}", facts.meter),
            _ => "in duple time".to_string(),
        },
    }
}

fn register(facts: &Facts, choices: &mut Choices) -> &'static str {
    match facts.register {
        Register::Low => choices.pick::<&str>(&["low", "low-pitched", "deep"]),
        Register::Middle => choices.pick::<&str>(&["mid-range", "middle-register"]),
        Register::High => choices.pick::<&str>(&["high", "high-pitched"]),
    }
}

/// Form before another noun: "string chords".
fn one(instrument: &str) -> &str {
    if instrument == "strings" { "string" } else { instrument }
}

/// With its indefinite article.
fn a(words: &str) -> String {
    let article = if words.starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" };
    format!("{article} {words}")
}

/// Half of the captions start with a capital and end with a full stop.
fn capitalise(text: &str, choices: &mut Choices) -> String {
    if !choices.chance(0.5) {
        return text.to_string();
    }
    let mut chars = text.chars();
    chars.next().map_or(String::new(), |c| format!("{}{}.", c.to_uppercase(), chars.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abc::parse;
    use crate::arrange::arrange;

    #[test]
    fn captions_are_short_varied_and_true() {
        let body = "GABc dedB|c2A2 A2GA|B2d2 d2cB|ABcA G4|".repeat(6);
        let tune = parse(&format!("X:1\nT:Test\nR:hornpipe\nM:C|\nL:1/8\nK:G\n{body}")).remove(0);
        let mut forms = std::collections::HashSet::new();
        let mut texts = std::collections::HashSet::new();
        let mut n = 0;
        for i in 0..2000 {
            let mut choices = Choices::new(9, &format!("{i}"));
            let Some(arrangement) = arrange(&tune, 5.12, &mut choices) else { continue };
            let facts = arrangement.facts;
            let (text, form) = caption(&facts, &mut choices);
            n += 1;
            forms.insert(form);
            let lower = text.to_lowercase();
            assert!(text.split_whitespace().count() <= MAX_WORDS, "{text}");
            assert!(lower.contains(facts.instrument), "{text}");
            let says = |words: &[&str]| words.iter().any(|w| lower.contains(w));
            match facts.tempo {
                Tempo::Slow => assert!(!says(&["fast", "quick", "lively", "medium", "moderate"]), "{text}"),
                Tempo::Medium => assert!(!says(&["fast", "quick", "lively", "slow", "unhurried"]), "{text}"),
                Tempo::Fast => assert!(!says(&["slow", "unhurried", "medium", "moderate"]), "{text}"),
            }
            let with_drums = matches!(facts.accompaniment, Accompaniment::Drums | Accompaniment::Band);
            assert_eq!(lower.replace("steel drums", "").contains("drum"), with_drums, "{text}");
            assert!(!lower.contains("reel") && !lower.contains("jig"), "{text}");
            texts.insert(lower);
        }
        assert_eq!(forms.len(), N_FORMS);
        assert!(texts.len() * 10 > n * 8, "{} different captions of {n}", texts.len());
    }
}
