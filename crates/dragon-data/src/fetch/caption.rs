//! Captions of recordings, put together from titles, comments and folders.

use serde_json::{Map, Value, json};

use super::tracks::Track;
use crate::rng::Choices;

/// A caption from what the package says about the track, and one measured word.
pub(super) fn caption(
    track: &Track,
    centroid_hz: f64,
    choices: &mut Choices,
) -> (String, Map<String, Value>) {
    let style = match (track.package.name, track.world.as_str()) {
        ("supertux-data", "retro") => {
            *choices.pick(&["retro game", "retro chiptune", "old-school video game"])
        }
        _ => *choices.pick(track.package.styles),
    };
    let noun = *choices.pick(&["music", "track", "piece", "soundtrack", "music", "instrumental"]);
    let is_sung = track.package.name == "marsshooter-data"; // a band with a singer
    let noun = if is_sung && noun == "instrumental" { "song" } else { noun };
    let title = track.tags.get("title").map(|t| tidy_title(t)).filter(|t| !t.is_empty());
    let purpose = track
        .tags
        .get("description")
        .or(track.tags.get("comment"))
        .and_then(|c| purpose(c))
        .or_else(|| world_words(&track.world).map(str::to_string));
    // about a quarter of the corpus lies below, a fifth above; measured on the corpus itself
    let shade = match centroid_hz {
        c if c < 1100.0 => Some("dark-sounding"),
        c if c > 2030.0 => Some("bright-sounding"),
        _ => None,
    };
    let vocals = is_sung
        .then(|| *choices.pick(&["with female vocals", "with a female singer", "with a woman singing"]));

    let mut words = String::new();
    let mut said = Vec::new();
    if let Some(shade) = shade.filter(|_| choices.chance(0.5)) {
        words += &format!("{shade} ");
        said.push("shade");
    }
    words += &format!("{style} {noun}");
    if let Some(vocals) = vocals.filter(|_| choices.chance(0.7)) {
        words += &format!(" {vocals}");
        said.push("vocals");
    }
    if let Some(purpose) = purpose.as_ref().filter(|_| choices.chance(0.6)) {
        words += &format!(" {purpose}");
        said.push("purpose");
    }
    if let Some(title) = title.as_ref().filter(|_| choices.chance(0.5)) {
        words = match choices.below(4) {
            0 => format!("{words}, called {title}"),
            1 => format!("{title}: {words}"),
            2 => format!("{words} titled {title}"),
            _ => format!("{words}, {title}"),
        };
        said.push("title");
    }
    let n = words.split_whitespace().count();
    let caption = if n > crate::caption::MAX_WORDS {
        words.split_whitespace().take(crate::caption::MAX_WORDS).collect::<Vec<_>>().join(" ")
    } else {
        words
    };
    let facts =
        json!({ "style": style, "title": title, "purpose": purpose, "world": track.world, "said": said });
    match facts {
        Value::Object(map) => (caption, map),
        _ => unreachable!("an object was written"),
    }
}

/// "Gameplay music, intended for use in underground scenarios" is "for underground scenarios".
fn purpose(comment: &str) -> Option<String> {
    let comment = comment.to_lowercase();
    let (_, rest) = comment.split_once("for use in ").or_else(|| comment.split_once("for "))?;
    if let Some((_, faction)) = comment.split_once("associated with ") {
        return Some(format!("for {faction}"));
    }
    (!rest.trim().is_empty() && !comment.contains("formerly")).then(|| format!("for {}", rest.trim()))
}

/// Words for a folder of levels.
fn world_words(world: &str) -> Option<&'static str> {
    Some(match world {
        "forest" => "for a forest level",
        "antarctic" => "for an icy level",
        "castle" => "for a castle level",
        "tropical" => "for a tropical level",
        _ => return None,
    })
}

/// Title without addresses, versions in brackets and file endings.
fn tidy_title(title: &str) -> String {
    let title = title.split(" (").next().unwrap_or(title);
    let title = title.trim_end_matches(".mp3").replace(['_', '"'], " ");
    let words = title.split(|c: char| c.is_whitespace()).filter(|w| !w.is_empty() && !w.contains("www."));
    words.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_become_purposes() {
        let cases = [
            ("Gameplay music, intended for use in underground scenarios", Some("for underground scenarios")),
            ("Gameplay music, intended for tragic love scenes", Some("for tragic love scenes")),
            ("Gameplay music, originally from Northern Rebirth", None),
            ("Formerly the main menu music of Battle For Wesnoth, now mood music", None),
            ("http://www.dougkaufman.net", None),
        ];
        for (comment, want) in cases {
            assert_eq!(purpose(comment).as_deref(), want, "{comment}");
        }
    }

    #[test]
    fn titles_are_tidied() {
        assert_eq!(tidy_title("SixtyFour_Revisited"), "SixtyFour Revisited");
        assert_eq!(tidy_title("The Cave (Milestone 2 Version)"), "The Cave");
        assert_eq!(tidy_title("elysis-subcities.mp3"), "elysis-subcities");
    }
}
