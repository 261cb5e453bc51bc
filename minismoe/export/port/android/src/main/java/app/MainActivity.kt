package app

import android.app.Activity
import android.os.Bundle
import android.widget.Button
import android.widget.EditText
import android.widget.LinearLayout
import android.widget.TextView
import java.io.File
import kotlin.concurrent.thread

class MainActivity : Activity() {
    /** The model's folder: the assets, copied once, since C opens it by path. */
    private fun folder(): File {
        val model = File(filesDir, "model-" + packageManager.getPackageInfo(packageName, 0).lastUpdateTime)
        if (model.exists()) return model
        filesDir.listFiles { file -> file.name.startsWith("model-") }?.forEach { it.deleteRecursively() }
        val copy = File(filesDir, "model-copy").apply { mkdirs() }
        for (name in assets.list("model")!!)
            assets.open("model/$name").use { from -> File(copy, name).outputStream().use { from.copyTo(it) } }
        check(copy.renameTo(model)) { "cannot write $model" }
        return model
    }

    override fun onCreate(state: Bundle?) {
        super.onCreate(state)
        val question = EditText(this)
        val ask = Button(this).apply { text = "Ask" }
        val answer = TextView(this)
        setContentView(LinearLayout(this).apply {
            orientation = LinearLayout.VERTICAL
            listOf(question, ask, answer).forEach(::addView)
        })
        val model by lazy { Answer(folder().path, 0) }
        ask.setOnClickListener {
            val text = question.text.toString()
            thread {
                val said = try { model.ask(text, null, false) } catch (e: Exception) { e.message }
                runOnUiThread { answer.text = said }
            }
        }
    }
}
