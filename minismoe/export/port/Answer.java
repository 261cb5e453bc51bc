package app;

import java.nio.charset.StandardCharsets;

/** An exported folder, opened: answer.h for the JVM. An error is an exception with one line. */
public final class Answer implements AutoCloseable {
    static { System.loadLibrary("answer"); }

    private long handle;

    /** threads: 0 for one a core. */
    public Answer(String folder, int threads) { handle = open(bytes(folder), threads); }

    /** The answer to a question. task: null for the folder's only one; choose: from its set. */
    public synchronized String ask(String question, String task, boolean choose) {
        if (handle == 0) throw new IllegalStateException("the model is closed");
        byte[] text = ask(handle, bytes(question), task == null ? null : bytes(task), choose);
        return new String(text, StandardCharsets.UTF_8);
    }

    @Override public synchronized void close() { close(handle); handle = 0; }

    /** With a zero at the end, as C has it. JNI's own strings are not UTF-8. */
    private static byte[] bytes(String text) { return (text + '\0').getBytes(StandardCharsets.UTF_8); }

    private static native long open(byte[] folder, int threads);
    private static native byte[] ask(long handle, byte[] question, byte[] task, boolean choose);
    private static native void close(long handle);
}
