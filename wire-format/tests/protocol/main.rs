//! The protocol from outside: what its frames look like, what is made of bad ones, and that its document is true.

mod document;
mod examples;
mod frames;
mod fuzzed;
mod hostile;
