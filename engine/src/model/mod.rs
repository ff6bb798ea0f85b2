//! Migrations in virtual time, for predictions and for comparing policies on one trace. Pure: no clock, no files.
//!
//! [`Trace`] is what a program wrote, [`Site`] the link and the hosts, and [`simulate`] runs the engine's own policy over
//! them: the same [`crate::policy`] that decides in a migration.

mod based;
mod forecast;
mod migration;
mod site;
mod trace;

pub use forecast::{Doubt, Estimate, Forecast, forecast};
pub use migration::{Outcome, Round, Wish, simulate};
pub use site::{HEAD, Load, PageCost, Site};
pub use trace::{Pages, Trace};
