//! Lets a test's connections use kernel TLS when `cargo xtask vm` asks for it; without it they do not.
#![allow(clippy::expect_used, reason = "a test that was to use the kernel must not pass without it")]

use std::sync::Once;

use hauberk::tls::ktls;

pub(crate) fn if_asked() {
    static ONCE: Once = Once::new();
    if std::env::var_os("HAUBERK_KERNEL_TLS").is_some() {
        ONCE.call_once(|| ktls::probe().expect("HAUBERK_KERNEL_TLS is set").switch_on());
    }
}
