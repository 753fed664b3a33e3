//! Fields of the JSON files that lie beside published weights; a message names the key.

use serde_json::Value;

/// A field, whatever it holds.
///
/// # Errors
/// If it is missing.
pub fn field<'a>(json: &'a Value, key: &str) -> Result<&'a Value, String> {
    json.get(key).ok_or_else(|| format!("`{key}` is missing"))
}

/// A whole number, also where it is written as `16.0`.
///
/// # Errors
/// If it is missing, negative, has a fraction, or is no number.
pub fn number(json: &Value, key: &str) -> Result<usize, String> {
    let found = field(json, key)?;
    whole(found).ok_or_else(|| format!("`{key}`: expected a whole number, found {found}"))
}

/// A list of whole numbers, as [`number`] reads them.
///
/// # Errors
/// If it is missing or holds anything else.
pub fn numbers(json: &Value, key: &str) -> Result<Vec<usize>, String> {
    let found = field(json, key)?;
    let list = found.as_array().and_then(|list| list.iter().map(whole).collect());
    list.ok_or_else(|| format!("`{key}`: expected whole numbers, found {found}"))
}

fn whole(value: &Value) -> Option<usize> {
    let x = value.as_f64().filter(|x| x.fract() == 0.0 && (0.0..9e15).contains(x))?;
    Some(x as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn whole_numbers_are_read_and_all_else_is_refused_by_name() {
        let json = json!({"n": 16.0, "list": [2, 4.0], "bad": [2, -1], "half": 0.5, "text": "16"});
        assert_eq!(number(&json, "n"), Ok(16));
        assert_eq!(numbers(&json, "list"), Ok(vec![2, 4]));
        assert_eq!(numbers(&json, "bad").unwrap_err(), "`bad`: expected whole numbers, found [2,-1]");
        assert_eq!(number(&json, "half").unwrap_err(), "`half`: expected a whole number, found 0.5");
        assert_eq!(number(&json, "text").unwrap_err(), "`text`: expected a whole number, found \"16\"");
        assert_eq!(number(&json, "none").unwrap_err(), "`none` is missing");
    }
}
