//! (being written)
/// x
pub async fn serve_page(
    _l: tokio::net::TcpListener,
    _page: impl Fn(&str) -> Option<String> + Send + Sync + 'static,
) {
}
