// Run on Linux by Mono 6.12. Beside it: answer.c compiled with -DANSWER_LIBRARY to a shared library,
// linked with onnxruntime.
using System;
using System.Runtime.InteropServices;

static class Answer {
    [StructLayout(LayoutKind.Sequential)] struct Result {
        public UIntPtr Most, Best; public int Trim; public IntPtr Text; public double LogProb;
        public IntPtr Choices; public UIntPtr Found, PromptTokens, Tokens, Steps; public double FirstToken; }
    [DllImport("answer")] static extern IntPtr open_answer([MarshalAs(UnmanagedType.LPUTF8Str)] string folder, int threads);
    [DllImport("answer")] static extern int ask_answer(IntPtr handle, [MarshalAs(UnmanagedType.LPUTF8Str)] string question,
        [MarshalAs(UnmanagedType.LPUTF8Str)] string task, ref Result result);
    [DllImport("answer")] static extern IntPtr answer_error(IntPtr handle);
    static void Main(string[] args) {                    // FOLDER QUESTION
        IntPtr model = open_answer(args[0], 0); var result = new Result();
        bool failed = ask_answer(model, args[1], null, ref result) != 0;
        Console.WriteLine(Marshal.PtrToStringUTF8(failed ? answer_error(model) : result.Text)); } }
