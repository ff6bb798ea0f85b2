//! scratch
fn main() {
    if std::env::args().nth(1).as_deref() == Some("--check-subject") {
        pageferry_criu_glue::check::subject_main();
        return;
    }
    let criu = pageferry_criu_glue::Criu::find(None).unwrap();
    for c in pageferry_criu_glue::check::by_trying(&criu, || {
        let mut c = std::process::Command::new(std::env::current_exe().unwrap());
        c.arg("--check-subject");
        c
    }) {
        println!("{c:?}");
    }
}
