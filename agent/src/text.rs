//! Bytes and errors as text.

use std::error::Error;
use std::fmt::Write;

/// Lower-case hexadecimal digits, two for each byte.
pub(crate) fn hex(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        // Writing into a String does not fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// What is said of an error, and then every cause of it: the innermost one is often the one that helps.
pub(crate) fn with_causes(said: &str, error: &dyn Error) -> String {
    let mut text = said.to_owned();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
