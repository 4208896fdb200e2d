//! What the agent's log shows, however much of it somebody asks for.

use tracing::{Level, Metadata, Subscriber};
use tracing_subscriber::{
    EnvFilter, Layer,
    filter::{FilterExt, filter_fn},
    fmt::{self, MakeWriter},
    layer::SubscriberExt,
    registry,
};

/// A log at the levels that `asked` names, in the form of `RUST_LOG`; `info`
/// if that says nothing.
pub fn to<W>(writer: W, colours: bool, asked: Option<&str>) -> impl Subscriber
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let asked = asked.and_then(|asked| EnvFilter::try_new(asked).ok());
    let levels = asked.unwrap_or_else(|| EnvFilter::new("info"));
    let lines = fmt::layer().with_ansi(colours).with_writer(writer);
    registry().with(lines.with_filter(levels.and(filter_fn(may_be_shown))))
}

/// ttrpc traces every message byte by byte, and some carry tickets.
fn may_be_shown(metadata: &Metadata<'_>) -> bool {
    *metadata.level() < Level::TRACE || !metadata.target().starts_with("ttrpc")
}
