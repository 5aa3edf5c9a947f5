//! The crypto provider: aws-lc-rs, narrowed to what TLS 1.3 between agents needs.

use std::sync::{Arc, OnceLock};

use rustls::SupportedCipherSuite;
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{self, cipher_suite, kx_group};

/// The provider every configuration of ours is built with.
///
/// Key exchange: X25519MLKEM768 first, so that recorded traffic stays secret from a later quantum
/// computer; X25519 and P-256 for peers without it.
pub fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    let built = PROVIDER.get_or_init(|| {
        Arc::new(CryptoProvider {
            cipher_suites: cipher_suites(aes_in_hardware()),
            kx_groups: vec![kx_group::X25519MLKEM768, kx_group::X25519, kx_group::SECP256R1],
            ..aws_lc_rs::default_provider()
        })
    });
    Arc::clone(built)
}

/// AES-128-GCM is the fastest at a security level nobody doubts, where the CPU has AES; without it
/// ChaCha20-Poly1305 is both faster and constant in time.
fn cipher_suites(aes: bool) -> Vec<SupportedCipherSuite> {
    let gcm = [cipher_suite::TLS13_AES_128_GCM_SHA256, cipher_suite::TLS13_AES_256_GCM_SHA384];
    let chacha = [cipher_suite::TLS13_CHACHA20_POLY1305_SHA256];
    if aes { [&gcm[..], &chacha[..]].concat() } else { [&chacha[..], &gcm[..]].concat() }
}

/// Whether the CPU has instructions for AES and carry-less multiplication.
pub fn aes_in_hardware() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        std::arch::is_x86_feature_detected!("aes") && std::arch::is_x86_feature_detected!("pclmulqdq")
    }
    #[cfg(target_arch = "aarch64")]
    {
        std::arch::is_aarch64_feature_detected!("aes") && std::arch::is_aarch64_feature_detected!("pmull")
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_suite_is_the_one_the_cpu_accelerates() {
        assert_eq!(cipher_suites(true)[0], cipher_suite::TLS13_AES_128_GCM_SHA256);
        assert_eq!(cipher_suites(false)[0], cipher_suite::TLS13_CHACHA20_POLY1305_SHA256);
    }

    #[test]
    fn key_exchange_prefers_the_post_quantum_hybrid() {
        assert_eq!(provider().kx_groups[0].name(), rustls::NamedGroup::X25519MLKEM768);
    }
}
