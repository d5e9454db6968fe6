"""Commands of FlagEmbedding and PaddleNLP and files of RAG-Retrieval, as their users have them."""

FLAG_EMBEDDING = """--model_name_or_path bert-base-uncased --train_data ./ft_data/training_neg_10.json
    --train_group_size 8 --query_max_len 512 --passage_max_len 512 --pad_to_multiple_of 8
    --query_instruction_for_retrieval 'Represent this sentence for searching relevant passages: '
    --query_instruction_format '{}{}' --output_dir ./output/neg10 --overwrite_output_dir --learning_rate 1e-5 --fp16
    --num_train_epochs 3 --per_device_train_batch_size 4 --warmup_ratio 0.1 --logging_steps 200 --save_steps 2000
    --temperature 0.02 --sentence_pooling_method cls --normalize_embeddings True --kd_loss_type kl_div"""
PADDLE = """--do_train --model_name_or_path rocketqa-zh-base-query-encoder --output_dir ./checkpoints
    --train_data ./data/dureader_dual.train.jsonl --overwrite_output_dir --fine_tune_type sft
    --sentence_pooling_method cls --num_train_epochs 3 --per_device_train_batch_size 64 --learning_rate 3e-5
    --train_group_size 4 --recompute --passage_max_len 512 --use_matryoshka"""
SHORT = """--model_name_or_path ./bge-large-zh-v1.5 --train_data ./toy_finetune_data.jsonl --epoch 2 --batch_size 2
    --train_group_size 2 --query_max_len 256 --passage_max_len 256 --save_steps 1000 --output_dir ./checkpoint --lr 1e-5
    --query_instruction_for_retrieval "" --temperature 0.02"""
FLAG_EMBEDDING_M3 = """--model_name_or_path BAAI/bge-m3 --cache_dir ./cache/model --train_data ./train.jsonl
    --cache_path ./cache/data --train_group_size 8 --query_max_len 512 --passage_max_len 512 --pad_to_multiple_of 8
    --knowledge_distillation True --same_dataset_within_batch True --small_threshold 0 --drop_threshold 0
    --output_dir ./out --overwrite_output_dir --learning_rate 1e-5 --num_train_epochs 2
    --per_device_train_batch_size 2 --dataloader_drop_last True --warmup_ratio 0.1 --gradient_checkpointing
    --deepspeed ../ds_stage0.json --logging_steps 1 --save_steps 1000 --negatives_cross_device --temperature 0.02
    --sentence_pooling_method cls --normalize_embeddings True --kd_loss_type m3_kd_loss --unified_finetuning True
    --use_self_distill True --fix_encoder False --self_distill_start_step 0 --colbert_dim -1"""
RAG_COLBERT = """--model_name_or_path hfl/chinese-roberta-wwm-ext --dataset ./train.jsonl --output_dir ./out
    --batch_size 4 --lr 5e-6 --epochs 2 --save_on_epoch_end 1 --log_with wandb --warmup_proportion 0.1 --neg_nums 15
    --temperature 0.02 --query_max_len 128 --passage_max_len 512 --colbert_dim 768 --gradient_accumulation_steps 2"""
RAG_TRAIN = """\
model_name_or_path: "BAAI/bge-base-zh-v1.5"
train_type: "train"
train_dataset: "{train}"
neg_nums: 5
query_max_len: 128
passage_max_len: 512
shuffle: true
output_dir: "./output/t2ranking_100_example"
save_on_epoch_end: 1
num_max_checkpoints: 5
temperature: 0.02
epochs: 2
lr: 2e-5
batch_size: 8
seed: 666
warmup_proportion: 0.1
gradient_accumulation_steps: 3
mixed_precision: bf16
all_gather: True
gradient_checkpointing: True
use_mrl: false
mrl_dims: "128, 256, 512, 768, 1024, 1280, 1536, 1792"
log_interval: 10
log_with: "wandb" # "wandb" or "tensorboard"
"""
RAG_DISTILL = """\
model_name_or_path: "BAAI/bge-base-zh-v1.5"
train_type: "distill"
train_dataset: "{train}"
train_dataset_vec: "{vectors}"
query_max_len: 512
{width}: 3584
shuffle: false
output_dir: "./output/t2ranking_100_example_distill"
save_on_epoch_end: 0
epochs: 2
lr: 1e-4
batch_size: 128
mixed_precision: bf16
gradient_checkpointing: True
use_mrl: true
mrl_dims: "256,512,1024,1536,2048,2560,3072,3584"
safe_serialization: false
"""
