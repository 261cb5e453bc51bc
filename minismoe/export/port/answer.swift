// Run on Linux by Swift 6.0, and not in an app. In Xcode: add answer.c (with -DANSWER_LIBRARY),
// answer.h, module.modulemap and, as a folder reference, the exported folder. Link onnxruntime: the
// pod onnxruntime-c, 1.30 or later.
import AnswerC
import Foundation

func answer(_ question: String) -> String {
    let model = open_answer(Bundle.main.path(forResource: "model", ofType: nil)!, 0)
    defer { close_answer(model) }
    var result = AnswerResult()
    let failed = ask_answer(model, question, nil, &result) != 0
    return String(cString: failed ? answer_error(model) : result.text)
}
